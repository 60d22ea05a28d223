"""Rounds in memory: training a share of a round's rows. The steps put files around it, `mixing` mixes what came."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedpipe.aggregate import Terms, picked
from fedpipe.context import Ctx
from fedpipe.errors import FedpipeError
from fedpipe.failures import attempt, judge, not_finite, over_budget, said
from fedpipe.loop.client import Client, Result
from fedpipe.memory.enforce import Witness
from fedpipe.memory.parts import Parts
from fedpipe.messages import Held, all_finite, layout, numbers, sizes
from fedpipe.mixing import Mixing, Rows, Sent, World, row_id
from fedpipe.records import changed
from fedpipe.runtime import Runtime
from fedpipe.types import Patterns, Plan, Tensors

__all__ = ["Rounds", "Rows", "Sent", "World"]
# of (start, plan, reply, what is received): bytes of payload and header
Down = dict[tuple[str, str, str | None, Patterns], tuple[int, int]]
ROOM = 4 << 30  # bytes of a round's messages that wait on the device that trains; more of them wait on the host


class Rounds(Mixing):
    """Trains and mixes rounds of one run."""

    def __init__(self, runtime: Runtime, plans: dict[str, Plan], predicted: dict[tuple[str, int], Parts], rows: Rows,
                 training_rows: dict[int, Tensor], budgets: dict[int, int | None]):  # fmt: skip
        super().__init__(runtime, plans, rows)
        self.predicted, self.training_rows, self.budgets = predicted, training_rows, budgets
        self.awaited = {(r["round"], u) for r in rows if r["kind"] == "mix" for u in r["updates"]}
        self.peaks: Rows = []
        self.careful = False  # whether each client is looked at as soon as it has trained
        self.warned: set[tuple[str, int]] = set()  # (plan, phase) that were said to be over budget

    def groups(self, t: int) -> list[Rows]:
        """The stacked groups of a round, in order."""
        found: dict[int, Rows] = {}
        for r in self.by_round.get(t, []):
            if r["kind"] == "train":
                found.setdefault(r["group"], []).append(r)
        return [found[g] for g in sorted(found)]

    def train(self, t: int, world: World, groups: Iterable[Rows]) -> list[Sent]:
        """`trained`, all of it."""
        return list(self.trained(t, world, groups))

    def trained(self, t: int, world: World, groups: Iterable[Rows], mixed: bool = False) -> Iterator[Sent]:
        """Train groups of a round, each when its first client is asked for.

        A client fails when its training raises, when it is measured and goes over its budget, or when it comes to
        values that are not finite. That is a FedpipeError, or the client sends nothing where the study drops it.
        mixed: `mix` follows in this process, and so the mean, which any value that is not finite shows in: clients are
        looked at one by one only where it does.
        """
        down: Down = {}
        room = ROOM
        for group in groups:
            came = self._came(group, world, down, room, mixed)
            room -= sum(sent.metrics[0]["payload_up"] for sent in came)
            yield from came
            del came  # what is let go of it is to be gone while the next group trains

    def _came(self, group: Rows, world: World, down: Down, room: int, mixed: bool) -> list[Sent]:
        """What the clients of a group send."""
        out = []
        plan = self.plans[group[0]["plan"]]
        later = self._foldable(group, world) if mixed else frozenset()
        trained = self._trained(group, plan, world, later)
        losses = _losses([result for result, _ in trained])
        for row, (result, failed), lost in zip(group, trained, losses, strict=True):
            own = self.rt.filled(plan, row["round"], row["client"])
            key = (row["start"], row["plan"], row["reply"], own.down)
            if key not in down:
                down[key] = self._down(row, own, world)
            sent = self._sent(row, plan, result, failed, lost, down[key], room > 0)
            if later and isinstance(sent.message, Held):
                sent.doubt = replace(result, at={}, sent={n: sent.message.tensors[n] for n in result.sent})
            room -= sent.metrics[0]["payload_up"]
            out.append(sent)
        return out

    def _foldable(self, group: Rows, world: World) -> frozenset[str]:
        """Names that a mean shows to be finite or not: none where a method aggregates by itself, or nobody mixes."""
        if self.rt.method.aggregate or any((r["round"], row_id(r)) not in self.awaited for r in group):
            return frozenset()
        wanted = self.of(group[0]["plan"], world.states[group[0]["start"]]).wanted
        return frozenset(n for n in wanted if not n.startswith("mask/"))  # they choose entries, and are not averaged

    def _trained(
        self, group: Rows, plan: Plan, world: World, later: frozenset[str] = frozenset()
    ) -> list[tuple[Result, bool]]:
        """What each client of a group came to, and whether it failed; later: names that are not looked at yet."""
        received = self._received(group, plan, world)  # a damaged file is no client's failure
        on, witness = self.rt.run.on_client_failure, self._witness(group[0])
        loop = self.rt.loop(witness.phase if witness else None)
        ctx = self.rt.ctx(group[0]["round"])
        outcome = attempt(lambda: loop.train([self._client(*p, ctx) for p in zip(group, received, strict=True)], plan))
        self.peaks += witness.rows if witness else []
        if not isinstance(outcome, Exception):
            over = over_budget(group[0], witness.over(), self.rt.run.budget, self.warned) if witness else None
            if not over and all_finite([t for o in outcome for t in _seen(o, later)]):
                return [(o, False) for o in outcome]
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

    def _received(self, group: Rows, plan: Plan, world: World) -> list[Tensors]:
        """What each client of a group starts from; clients of one state share its tensors."""
        starts: dict[tuple[str, Patterns], Tensors] = {}
        out = []
        for row in group:
            own = self.rt.filled(plan, row["round"], row["client"])
            if (key := (row["start"], own.down)) not in starts:
                starts[key] = self.rt.moved(self.rt.received(own, world.states[row["start"]]))
            reply = picked(world.states[row["reply"]], plan.reply) if row["reply"] else {}
            out.append({**starts[key], **{f"re/{n}": t for n, t in reply.items()}, **world.own(row["client"])})
        return out

    def _client(self, row: dict[str, Any], received: Tensors, ctx: Ctx) -> Client:
        """A client of the loop; ctx: that of its round."""
        rows = self.training_rows[row["client"]]
        return self.rt.client(changed(ctx, client=row["client"], samples=len(rows)), received, rows)

    def _down(self, row: dict[str, Any], plan: Plan, world: World) -> tuple[int, int]:
        """(payload, header) bytes of what a client receives, as of the very messages."""
        state = world.states[row["start"]]
        terms = Terms(plan, state) if self.rt.method.fill else self.of(row["plan"], state)
        counted = [sizes(terms.down, {"round": row["round"], "state": row["start"]})]
        if row["reply"]:
            reply = picked(world.states[row["reply"]], plan.reply)
            counted.append(sizes(layout(reply), {"state": row["reply"]}))
        return sum(payload for payload, _ in counted), sum(header for _, header in counted)

    def _sent(self, row: dict[str, Any], plan: Plan, result: Result, failed: bool, losses: list[list[float]],
              down: tuple[int, int], stays: bool) -> Sent:  # fmt: skip
        """What one client sends. losses: first and last of each phase; stays: on the device that trained it."""
        samples = len(self.training_rows[row["client"]])
        weight = float(samples) if plan.weight == "samples" else 1.0
        message, up = None, (0, 0)
        if not failed:
            meta = {"client": row["client"], "round": row["round"], "samples": samples, "weight": weight}
            sent = {n: (t if stays else t.cpu()).contiguous() for n, t in sorted(result.sent.items())}
            message = Held(sent, meta)
            if (row["round"], row_id(row)) in self.awaited:  # a client that drops out sends nothing
                up = sizes(layout(sent), meta)
        metrics = [
            {
                "round": row["round"], "client": row["client"], "part": row["part"], "plan": row["plan"], "phase": i,
                "steps": steps, "loss_first": first if steps else None, "loss_last": last if steps else None,
                "samples": samples, "weight": weight, "failed": failed,
                "payload_up": 0 if i else up[0], "header_up": 0 if i else up[1],
                "payload_down": 0 if i else down[0], "header_down": 0 if i else down[1],
            }
            for i, ((steps, _, _), (first, last)) in enumerate(zip(result.phases, losses, strict=True))
        ]  # fmt: skip
        return Sent(row, message, {n: _own(t) for n, t in sorted(result.own.items())}, metrics)

    def _witness(self, row: dict[str, Any]) -> Witness | None:
        """Of a client that is measured, for its plan or as everybody is: it is a group of its own."""
        if not (row["witness"] or self.rt.run.measure == "all"):
            return None
        limits = [self.predicted[row["plan"], i] for i in range(len(self.plans[row["plan"]].phases))]
        return Witness(row, limits, self.budgets.get(row["client"]), self.rt.device, self.rt.run.budget)


def _seen(result: Result, later: frozenset[str]) -> list[Tensor]:
    """What is looked at now, of what a client sends and keeps. Of a tensor with a mask a mean need not read all."""
    sent = [t for n, t in result.sent.items() if n not in later or f"mask/{n}" in result.sent]
    return [*sent, *result.own.values()]


def _losses(results: list[Result]) -> list[list[list[float]]]:
    """First and last loss of each result's phases, read from the device at once."""
    flat = [x for r in results for _, first, last in r.phases for x in (first, last)]
    values = iter(numbers(flat))
    return [[[next(values), next(values)] for _ in r.phases] for r in results]


def _own(kept: Tensor) -> Tensor:
    """A tensor a client keeps, on the host, in memory of its own: not a view that holds on to its whole stack."""
    kept = kept.cpu()
    return kept.clone() if kept.untyped_storage().nbytes() > kept.nbytes else kept
