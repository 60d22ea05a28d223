"""The only training loop: clients, fine-tuning at evaluation, one client or a stack of them.

A stack is one batched program: every working name has a leading client axis and the per-step hooks, written for one
client, are vmapped. Autograd runs around the vmapped loss, so a stack saves what its clients would save.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpipe.config import Local
from fedpipe.context import Ctx
from fedpipe.errors import FedpipeError
from fedpipe.kernels.common import Backend
from fedpipe.models.chain import Chain
from fedpipe.phase import PhaseRun, Slots, pick
from fedpipe.seeding import seeded
from fedpipe.types import PRIVATE, Batch, Method, Phase, Plan, Tensors, matches, select

Probe = Callable[[int, Tensors], AbstractContextManager[Any]]  # phase, what is held before it


@dataclass
class Client:
    """One client's share of a round. `batches(phase, index)` gives its batches in order, as rows it can load."""

    ctx: Ctx
    at: Tensors  # received `in/*`, `re/*` and own `own/*` names
    batches: Callable[[Phase, int], list[Any]]
    load: Callable[[Any, int], Batch]  # (rows, padded size) -> batch
    noise: Callable[[int, int], np.random.Generator]  # (phase, step) -> its draws; padding draws after the rows
    seed: int = 0  # of layers that draw by themselves


@dataclass
class Result:
    """What a client's training gave: names it sends, names it keeps, and per phase the steps and losses."""

    sent: Tensors
    own: Tensors
    at: Tensors
    phases: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)


def default_begin(at: Tensors, ctx: Ctx) -> Tensors:
    return {n[3:]: t for n, t in at.items() if n.startswith("in/model/")}


@dataclass(frozen=True)
class Loop:
    """Local training of a method under plans. `chain(plan)` is the client's model, `probe` measures a phase."""

    method: Method
    local: Local
    chain: Callable[[Plan], Chain]
    probe: Probe = lambda index, held: contextlib.nullcontext()
    kernel: Backend = "auto"  # of a fused step

    def train(self, clients: list[Client], plan: Plan) -> list[Result]:
        """Train clients of one plan, stacked when there is more than one. Raises FedpipeError on a bad plan."""
        chain = self.chain(plan)
        clients = [replace(c, ctx=replace(c.ctx, chain=chain)) for c in clients]
        ats = [self._begin(c, plan, chain) for c in clients]
        stacked = len(clients) > 1
        at = {n: torch.stack([a[n] for a in ats]) if stacked else ats[0][n].clone() for n in ats[0]}
        del ats
        phases: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in clients]
        carried: Slots = {}
        with seeded(clients[0].seed):
            for index, phase in enumerate(plan.phases):
                slots = {f"optimizer/{n}/{k}": v for n, s in carried.items() for k, v in s.items()}
                held = at | {n: v for n, v in slots.items() if isinstance(v, Tensor)}
                with self.probe(index, held):
                    run = PhaseRun(self.method, self.local, clients, phase, index, self.kernel)
                    at, carried, losses = run.run(at, carried)
                after = plan.phases[index + 1].live if phase.carry and index + 1 < len(plan.phases) else ()
                carried = {n: s for n, s in carried.items() if matches(n, after)}
                for mine, got in zip(phases, losses, strict=True):
                    mine.append(got)
        return [self._end(c, plan, at if not stacked else pick(at, i), phases[i]) for i, c in enumerate(clients)]

    def _begin(self, client: Client, plan: Plan, chain: Chain) -> Tensors:
        begin = self.method.begin or default_begin
        at = {**client.at, **begin(client.at, client.ctx)}
        absent = [n for n in chain.tensor_names if f"model/{n}" not in at]
        if absent:
            raise FedpipeError(f"method {self.method.name}: model/{absent[0]} is neither received nor made by begin")
        return {n: t for n, t in at.items() if not n.startswith(("in/", "re/")) or matches(n, plan.hold)}

    def _end(self, client: Client, plan: Plan, at: Tensors, phases: list[tuple[int, Tensor, Tensor]]) -> Result:
        at = {n: t.detach() for n, t in at.items()}
        ctx = replace(client.ctx, steps=sum(p[0] for p in phases))
        extra, kept = self.method.end(at, ctx) if self.method.end else ({}, {})
        sent = {**{n: t for n, t in at.items() if matches(n, plan.up)}, **extra}
        private = [n for n in sent if n.startswith(PRIVATE)]
        if private:
            raise FedpipeError(f"method {self.method.name}: {private[0]} is private and must not be sent")
        return Result(sent, select({**at, **kept}, plan.keep), at, phases)


def batch_rows(phase: Phase, rows: Tensor, gen: np.random.Generator, size: int, epochs: int) -> list[Tensor]:
    """The batches of a phase, as index tensors: a fresh permutation of `rows` [n] per epoch, the last one shorter."""

    def stream() -> Iterator[Tensor]:
        while True:
            yield from rows[torch.from_numpy(gen.permutation(len(rows)))].split(size)

    count = phase.steps or (phase.epochs or epochs) * -(-len(rows) // size)
    source = stream()
    return [next(source) for _ in range(count)]
