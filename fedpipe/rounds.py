"""Rounds in memory: training a share of a round's rows, and mixing what came back. The steps put files around it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpipe import io
from fedpipe.aggregate import check, cut
from fedpipe.client import Client, Result
from fedpipe.errors import FedpipeError
from fedpipe.failures import attempt, judge, not_finite, over_budget, said
from fedpipe.memory.enforce import Witness
from fedpipe.memory.parts import Parts
from fedpipe.runtime import Runtime
from fedpipe.stopping import Watch
from fedpipe.types import Plan, Tensors, Update, select

Rows = list[dict[str, Any]]


@dataclass
class World:
    """What exists between rounds: states by `node@version`, and every client's latest own file (tensors or a path)."""

    states: dict[str, Tensors]
    owns: dict[int, tuple[int, Tensors | Path]] = field(default_factory=dict)
    watch: Watch = Watch()  # of the study's `stop`

    def own(self, client: int) -> Tensors:
        found = self.owns.get(client, (0, {}))[1]
        return io.read_tensors(found)[0] if isinstance(found, Path) else found


@dataclass
class Sent:
    """What one row's training gave: its message (None when the client failed), what it keeps, its metrics."""

    row: dict[str, Any]
    image: bytes | None
    own: Tensors
    metrics: Rows


class Rounds:
    """Trains and mixes rounds of one run."""

    def __init__(self, runtime: Runtime, plans: dict[str, Plan], predicted: dict[tuple[str, int], Parts], rows: Rows,
                 training_rows: dict[int, Tensor], budgets: dict[int, int | None]):  # fmt: skip
        self.rt, self.plans, self.predicted = runtime, plans, predicted
        self.training_rows, self.budgets = training_rows, budgets
        self.by_round: dict[int, Rows] = {}
        for r in rows:
            self.by_round.setdefault(r["round"], []).append(r)
        self.awaited = {(r["round"], u) for r in rows if r["kind"] == "mix" for u in r["updates"]}
        self.rows = rows
        self.peaks: Rows = []
        self.warned: set[tuple[str, int]] = set()  # (plan, phase) that were said to be over budget

    def groups(self, t: int) -> list[Rows]:
        """The stacked groups of a round, in order."""
        found: dict[int, Rows] = {}
        for r in self.by_round.get(t, []):
            if r["kind"] == "train":
                found.setdefault(r["group"], []).append(r)
        return [found[g] for g in sorted(found)]

    def train(self, t: int, world: World, groups: Iterable[Rows]) -> list[Sent]:
        """Train groups of a round.

        A client fails when its training raises, when it is measured and goes over its budget, or when it comes to
        values that are not finite. That is a FedpipeError, or the client sends nothing where the study drops it.
        """
        down: dict[tuple[str, str, str | None], tuple[int, int]] = {}
        out = []
        for group in groups:
            plan = self.plans[group[0]["plan"]]
            for row, (result, failed) in zip(group, self._trained(group, plan, world), strict=True):
                key = (row["start"], row["plan"], row["reply"])
                if key not in down:
                    down[key] = self._down(row, plan, world)
                out.append(self._sent(row, plan, result, failed, down[key]))
        return out

    def _trained(self, group: Rows, plan: Plan, world: World) -> list[tuple[Result, bool]]:
        """What each client of a group came to, and whether it failed."""
        received = [self._received(r, plan, world) for r in group]  # a damaged file is no client's failure
        on, witness = self.rt.run.on_client_failure, self._witness(group[0])
        loop = self.rt.loop(witness.phase if witness else None)
        outcome = attempt(lambda: loop.train([self._client(*p) for p in zip(group, received, strict=True)], plan))
        self.peaks += witness.rows if witness else []
        if not isinstance(outcome, Exception):
            over = over_budget(group[0], witness.over(), self.rt.run.budget, self.warned) if witness else None
            return [(o, judge(r, over or not_finite(o), on)) for r, o in zip(group, outcome, strict=True)]
        if len(group) > 1:
            return self._one_by_one(group, plan, world, outcome)
        untrained = Result({}, {}, {}, [(0, torch.zeros(()), torch.zeros(()))] * len(plan.phases))
        return [(untrained, judge(group[0], said(outcome), on, outcome))]

    def _one_by_one(self, group: Rows, plan: Plan, world: World, error: Exception) -> list[tuple[Result, bool]]:
        """The clients of a stack that raised, each trained alone: those that fail alone have failed.

        Such a client fails in every way of running, and its stack with it. So the others, whose bytes are not those
        they have in a stack, have the same ones everywhere. Where nobody fails alone the stack was too large for this
        machine, or the method cannot be stacked: an error whatever the study does about failures, as to go on would let
        the machine decide bits.
        """
        alone = [self._trained([r], plan, world)[0] for r in group]
        if not any(failed for _, failed in alone):
            who = f"clients {', '.join(str(r['client']) for r in group)}, round {group[0]['round']}"
            raise FedpipeError(f"{who}: {said(error)}; each of them trains alone, so lower stack") from error
        return alone

    def mix(self, t: int, world: World, sent: Iterable[Sent]) -> World:
        """The world after round t: every Mix row's state, every client's own file."""
        by_id = {_row_id(s.row): s for s in sent}
        owns = dict(world.owns)
        owns |= {s.row["client"]: (t, s.own) for s in by_id.values() if s.own and s.image is not None}
        states = dict(world.states)
        for row in self.by_round.get(t, []):
            if row["kind"] == "mix":
                mixed = self._mix(row, states, [by_id[u] for u in row["updates"] if u in by_id])
                states[row["out"]] = dict(sorted(mixed.items()))
        return replace(world, states=states, owns=owns)

    def _mix(self, row: dict[str, Any], states: dict[str, Tensors], sent: list[Sent]) -> Tensors:
        base, arrived = states[row["base"]], [s for s in sent if s.image is not None]
        if sent and not arrived:
            raise FedpipeError(f"round {row['round']}: every client failed")
        if not arrived:
            return base
        # On the device that trains, whose kernels fold; states themselves live on the CPU.
        updates = (self._update(s, states[s.row["start"]]) for s in arrived)
        moved = (replace(u, tensors=self.rt.moved(u.tensors)) for u in updates)
        ctx = self.rt.ctx(row["round"], role="server")
        aggregate = self.rt.method.aggregate or (lambda state, updates, ctx: ctx.mean(state, updates))
        return {n: t.cpu() for n, t in aggregate(self.rt.moved(base), moved, ctx).items()}

    def _update(self, sent: Sent, start: Tensors) -> Update:
        row, plan = sent.row, self.plans[sent.row["plan"]]
        assert sent.image is not None
        who = f"update of client {row['client']}, round {row['round']}"
        tensors, meta = io.decode(sent.image, who)
        if (meta.get("client"), meta.get("round")) != (row["client"], row["round"]):
            raise FedpipeError(f"{who}: what arrived is of client {meta.get('client')}, round {meta.get('round')}")
        check(tensors, start, plan, who)
        return Update(row["client"], meta["weight"], meta["samples"], tensors, plan.index)

    def _received(self, row: dict[str, Any], plan: Plan, world: World) -> Tensors:
        at = self.rt.received(plan, world.states[row["start"]])
        if row["reply"]:
            at |= {f"re/{n}": t for n, t in select(world.states[row["reply"]], plan.reply).items()}
        return at | world.own(row["client"])

    def _client(self, row: dict[str, Any], received: Tensors) -> Client:
        rows = self.training_rows[row["client"]]
        return self.rt.client(self.rt.ctx(row["round"], row["client"], samples=len(rows)), received, rows)

    def _down(self, row: dict[str, Any], plan: Plan, world: World) -> tuple[int, int]:
        """(payload, header) bytes of what a client receives, from the very messages."""
        sent = cut(select(world.states[row["start"]], (*plan.down, *(f"!{p}" for p in plan.fixed))), plan.index)
        images = [io.encode(sent, {"round": row["round"], "state": row["start"]})]
        if row["reply"]:
            images.append(io.encode(select(world.states[row["reply"]], plan.reply), {"state": row["reply"]}))
        header = sum(io.header_bytes(i) for i in images)
        return sum(len(i) for i in images) - header, header

    def _sent(self, row: dict[str, Any], plan: Plan, result: Result, failed: bool, down: tuple[int, int]) -> Sent:
        samples = len(self.training_rows[row["client"]])
        weight = float(samples) if plan.weight == "samples" else 1.0
        meta = {"client": row["client"], "round": row["round"], "samples": samples, "weight": weight}
        image = None if failed else io.encode(result.sent, meta)
        header = io.header_bytes(image) if image else 0
        reports = (row["round"], _row_id(row)) in self.awaited  # a client that drops out sends nothing
        up = (len(image) - header, header) if image and reports else (0, 0)
        shared = {k: row[k] for k in ("round", "client", "part", "plan")}
        metrics = []
        for i, (steps, first, last) in enumerate(result.phases):
            bytes_ = (*up, *down) if i == 0 else (0, 0, 0, 0)
            names = ("payload_up", "header_up", "payload_down", "header_down")
            losses = (float(first), float(last)) if steps else (None, None)
            metrics.append(
                {**shared, "phase": i, "steps": steps, "loss_first": losses[0], "loss_last": losses[1]}
                | {"samples": samples, "weight": weight, "failed": failed, **dict(zip(names, bytes_, strict=True))}
            )
        return Sent(row, image, {n: t.cpu() for n, t in sorted(result.own.items())}, metrics)

    def _witness(self, row: dict[str, Any]) -> Witness | None:
        """Of a client that is measured, for its plan or as everybody is: it is a group of its own."""
        if not (row["witness"] or self.rt.run.measure == "all"):
            return None
        limits = [self.predicted[row["plan"], i] for i in range(len(self.plans[row["plan"]].phases))]
        return Witness(row, limits, self.budgets.get(row["client"]), self.rt.device, self.rt.run.budget)


def _row_id(row: dict[str, Any]) -> str:
    return f"{row['client']}:{row['part']}" if row["part"] else str(row["client"])
