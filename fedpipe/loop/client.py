"""The only training loop: clients, fine-tuning at evaluation, one client or a stack of them.

A stack is one batched program: every working name has a leading client axis and the per-step hooks, written for one
client, are vmapped. Autograd runs around the vmapped loss, so a stack saves what its clients would save.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpipe.config import Local
from fedpipe.context import Ctx
from fedpipe.errors import FedpipeError
from fedpipe.kernels.common import Backend
from fedpipe.loop.capture import Programs
from fedpipe.loop.mover import Slots
from fedpipe.loop.phase import PhaseRun
from fedpipe.loop.prefix import Kept
from fedpipe.loop.replay import Replays
from fedpipe.models.chain import Chain
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
    always: Tensors = field(default_factory=dict)  # part of every batch
    # of all clients of a stack at once, where it can: (rows, padded size, an x to write over)
    load_stack: Callable[[list[Any], int, Tensor | None], Batch] | None = None


@dataclass
class Result:
    """What a client's training gave: names it sends, names it keeps, and per phase the steps and losses."""

    sent: Tensors
    own: Tensors
    at: Tensors
    phases: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)


def _laid(name: str, tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """A copy, of a model's filters in the layout of images."""
    image = tensor.ndim == 4 and name.startswith("model/")
    return tensor.clone(memory_format=layout if image else torch.contiguous_format)


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
    programs: Programs = field(default_factory=Programs)
    layout: Callable[[Chain], torch.memory_format] = lambda chain: torch.contiguous_format  # of images and filters
    replays: Replays | None = None  # where captured steps are replayed as one
    patient: bool = False  # run the first steps as they are where that changes no bit: no memory is promised then

    def train(self, clients: list[Client], plan: Plan) -> list[Result]:
        """Train clients of one plan, stacked when there is more than one. Raises FedpipeError on a bad plan."""
        chain = self.chain(plan)
        ats = [self._begin(c, plan, chain) for c in clients]
        stacked, layout = len(clients) > 1, self.layout(chain)
        at = {n: torch.stack([a[n] for a in ats]) if stacked else _laid(n, ats[0][n], layout) for n in ats[0]}
        del ats
        phases: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in clients]
        carried: Slots = {}
        kept = Kept(chain, layout)
        with seeded(clients[0].seed):
            for index, phase in enumerate(plan.phases):
                slots = {f"optimizer/{n}/{k}": v for n, s in carried.items() for k, v in s.items()}
                held = at | {n: v for n, v in slots.items() if isinstance(v, Tensor)} | kept.sizes()
                with self.probe(index, held):
                    run = PhaseRun(
                        self.method, chain, self.local, clients, phase, index, self.kernel, layout, self.patient
                    )
                    at, carried, losses = run.run(at, carried, kept, self.programs, self.replays)
                after = plan.phases[index + 1].live if phase.carry and index + 1 < len(plan.phases) else ()
                carried = {n: s for n, s in carried.items() if matches(n, after)}
                for mine, got in zip(phases, losses, strict=True):
                    mine.append(got)
        parts = {n: t.unbind() for n, t in at.items()} if stacked else {}
        ends = [{n: t[i] for n, t in parts.items()} if stacked else at for i in range(len(clients))]
        return [self._end(c, plan, chain, a, p) for c, a, p in zip(clients, ends, phases, strict=True)]

    def _begin(self, client: Client, plan: Plan, chain: Chain) -> Tensors:
        begin = self.method.begin
        ctx = replace(client.ctx, chain=chain, plan=plan) if begin else client.ctx
        at = {**client.at, **(begin or default_begin)(client.at, ctx)}
        absent = [n for n in chain.tensor_names if f"model/{n}" not in at]
        if absent:
            raise FedpipeError(f"method {self.method.name}: model/{absent[0]} is neither received nor made by begin")
        return {n: t for n, t in at.items() if not n.startswith(("in/", "re/")) or matches(n, plan.hold)}

    def _end(
        self, client: Client, plan: Plan, chain: Chain, at: Tensors, phases: list[tuple[int, Tensor, Tensor]]
    ) -> Result:
        at = {n: t.contiguous() for n, t in at.items()}
        extra, kept = dict[str, Tensor](), dict[str, Tensor]()
        if self.method.end:
            extra, kept = self.method.end(
                at, replace(client.ctx, chain=chain, plan=plan, steps=sum(p[0] for p in phases))
            )
        sent = {**{n: t for n, t in at.items() if matches(n, plan.up)}, **extra}
        private = [n for n in sent if n.startswith(PRIVATE)]
        if private:
            raise FedpipeError(f"method {self.method.name}: {private[0]} is private and must not be sent")
        return Result(sent, select({**at, **kept}, plan.keep), at, phases)


def batch_rows(
    phase: Phase, rows: NDArray[np.int64], gen: np.random.Generator, size: int, epochs: int
) -> list[NDArray[np.int64]]:
    """The batches of a phase, as indices: a fresh permutation of `rows` [n] per epoch, the last one shorter."""
    count = phase.steps or (phase.epochs or epochs) * -(-len(rows) // size)
    out: list[NDArray[np.int64]] = []
    while len(out) < count:
        mixed = rows[gen.permutation(len(rows))]
        out += [mixed[i : i + size] for i in range(0, len(mixed), size)]
    return out[:count]


def fixed_batches(
    phase: Phase, mixed: NDArray[np.int64], gen: np.random.Generator, size: int, epochs: int
) -> list[NDArray[np.int64]]:
    """The batches of a phase whose members follow each other in `mixed` [n]: in a fresh order per epoch."""
    parts = [mixed[i : i + size] for i in range(0, len(mixed), size)]
    count = phase.steps or (phase.epochs or epochs) * len(parts)
    out: list[NDArray[np.int64]] = []
    while len(out) < count:
        out += [parts[k] for k in gen.permutation(len(parts))]
    return out[:count]
