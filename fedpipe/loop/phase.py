"""One phase of local training: its batches, its optimizer, its steps, for one client or a stack of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedpipe.config import Local
from fedpipe.errors import FedpipeError
from fedpipe.kernels.common import Backend
from fedpipe.loop.capture import Program, Programs
from fedpipe.loop.localstep import LocalStep, Outcome
from fedpipe.loop.lower import LARGE
from fedpipe.loop.mover import Mover, Slots
from fedpipe.loop.prefix import Kept, laid
from fedpipe.loop.replay import Replays
from fedpipe.models.dropout import PREFIX, aside
from fedpipe.types import Batch, Method, Phase, Tensors, matches

if TYPE_CHECKING:
    from fedpipe.loop.client import Client
    from fedpipe.models.chain import Chain


class PhaseRun:
    """One phase of one client or stack. kernel: what a fused step (`Phase.step`) runs by.

    A step is captured where that can be done (`fedpipe.loop.capture`), and plain SGD then moves the leaves within it.
    """

    def __init__(self, method: Method, chain: "Chain", local: Local, clients: "list[Client]", phase: Phase,
                 index: int, kernel: Backend, layout: torch.memory_format, patient: bool):  # fmt: skip
        self.method, self.local, self.clients, self.phase = method, local, clients, phase
        self.stacked, self.index, self.kernel, self.layout = len(clients) > 1, index, kernel, layout
        self.patient = patient
        self.rows = [c.batches(phase, index) for c in clients]
        self.counts = [len(r) for r in self.rows]
        self.sizes = [max(len(r[min(i, len(r) - 1)]) for r in self.rows) for i in range(max(self.counts))]
        lr = clients[0].ctx.lr * phase.lr
        self.chain, steps, self.least = chain, max(self.counts), min(self.counts)
        self.draws = method.draw is not None or bool(chain.noise)
        self.ctx = replace(clients[0].ctx, client=None, samples=0, phase=phase, lr=lr, steps=steps, chain=chain)
        # whether a batch may be written over the one before
        self.over = self.stacked and not phase.since and bool(clients[0].load_stack)
        self.used: Tensor | None = None  # images of the step before, which nothing reads any more
        each = [c.always for c in clients]
        self.always = {n: torch.stack([e[n] for e in each]) for n in each[0]} if self.stacked else each[0]
        self.found: dict[tuple[int, int], Program | None] = {}  # by what differs between the steps of a phase

    @torch.no_grad()
    def run(self, at: Tensors, carried: Slots, kept: Kept, programs: Programs, replays: Replays | None
            ) -> tuple[Tensors, Slots, list]:  # fmt: skip
        live = [n for n in at if matches(n, self.phase.live) and self._trainable(n, at[n])]
        if not live:
            raise FedpipeError(f"phase {self.phase.name}: no name fits live = {', '.join(self.phase.live)}")
        self.kept, self.programs = kept, programs
        kept.make(self.phase, at, self.clients, self.rows)
        if arena := replays.arena(at) if replays else None:
            at = arena.placed(at)
        flat = bool(self.phase.step)  # a fused step sees flat views
        leaves = {n: at[n].contiguous() if flat else at[n] for n in live}
        at = {**at, **leaves}
        who = f"method {self.method.name}: phase {self.phase.name}: step"
        mover = Mover(who, self.local.optimizer, self.phase.step, self.ctx.lr, leaves, carried, at, self.stacked,
                      self.kernel)  # fmt: skip
        if arena:
            mover.place(arena)
        self.arena = arena
        still = tuple(n for n in live if matches(n, self.phase.still))
        step = LocalStep(self.method, self.method.loss_in(self.phase), tuple(live), still, self.stacked)
        # a large weight moves otherwise in a captured step
        self.patient &= mover.sgd is None or all(t.nbytes < LARGE for t in leaves.values())
        first = last = torch.zeros(())
        for i in range(max(self.counts)):
            at, value = self._step(i, at, step, mover)
            if value is not None:
                last = value if i < self.least else torch.where(self._running(i, value), value, last)
                first = first if i else value
        pairs = zip(first, last, strict=True) if self.stacked else [(first, last)]
        slots = mover.slots
        if arena:
            at, slots = arena.taken(at), {n: arena.taken(s) for n, s in slots.items()}
        return at, slots, [(n, a, b) for n, (a, b) in zip(self.counts, pairs, strict=True)]

    def _trainable(self, name: str, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and name.split("/")[-1] not in self.chain.buffer_names

    def _step(self, i: int, at: Tensors, step: LocalStep, mover: Mover) -> tuple[Tensors, Tensor | None]:
        batch = self._batch(i)
        if self.draws:
            at = {**at, **self._draw(i, at, batch)}
        undo = self._remember(i, mover) if i >= self.least else None
        value, changed, d = self._outcome(i, at, batch, step, mover)
        mover.move(d, at)
        at.update(undo(changed, at) if undo else changed)
        self.used = batch["x"] if self.over and not changed else None
        return {n: t for n, t in at.items() if not n.startswith(PREFIX)} if self.chain.noise else at, value

    def _outcome(self, i: int, at: Tensors, batch: Batch, step: LocalStep, mover: Mover) -> Outcome:
        known = len(at), self.sizes[i]
        if known not in self.found:
            key = (self.phase, self.chain.key or self.chain)
            if self.patient and not self.programs.due(key, step, batch):
                return step(at, batch, self.ctx)
            self.found[known] = self.programs.find(key, step, at, mover.buffers, batch, self.ctx, mover.sgd)
        program = self.found[known]
        if program is None:
            return step(at, batch, self.ctx)
        wanted = i == 0 or i + 1 >= self.least  # the first value, and any that is some client's last
        return program(at, batch, mover.buffers, mover.scales, wanted, self.arena)

    def _batch(self, i: int) -> Batch:
        return {**self._loaded(i), **self.always}

    def _loaded(self, i: int) -> Batch:
        rows = [r[min(i, len(r) - 1)] for r in self.rows]
        size, first = self.sizes[i], self.clients[0]
        if self.phase.since:
            return self.kept.load(rows, size)
        if not self.stacked:
            return laid(first.load(rows[0], size), self.layout)
        if first.load_stack:
            over, self.used = self.used, None
            if over is not None and over.shape[1] != size:
                over = None
            return first.load_stack(rows, size, over)
        parts = [c.load(r, size) for c, r in zip(self.clients, rows, strict=True)]
        return {k: torch.stack([p[k] for p in parts]) for k in parts[0]}

    def _draw(self, i: int, at: Tensors, batch: Batch) -> Tensors:
        chain, draw = self.chain, self.method.draw
        units, device, each = chain.run_units(self.phase.upto), next(iter(batch.values())).device, []
        for k, client in enumerate(self.clients):
            mine, rows = (pick(at, k), pick(batch, k)) if self.stacked else (at, batch)
            gen = client.noise(self.index, i)
            masks = chain.noise(aside(gen), len(rows["w"]), units) if chain.noise else {}
            own = draw(gen, mine, rows, self.ctx) if draw else {}
            each.append({**own, **{n: m.to(device) for n, m in masks.items()}})
        if not self.stacked:
            return each[0]
        return {n: torch.stack([e[n] for e in each]) for n in each[0]}

    def _running(self, i: int, like: Tensor) -> Tensor:
        on = torch.tensor([i < n for n in self.counts], device=like.device)
        return (on if self.stacked else on[0]).reshape(like.shape[:1] + (1,) * (like.ndim - 1))

    def _remember(self, i: int, mover: Mover) -> Callable[[Tensors, Tensors], Tensors]:
        """Clients of a stack that have finished are put back after the step, optimizer state included."""
        moved = mover.moved()
        old = [t.clone() for t in moved]

        def undo(changed: Tensors, at: Tensors) -> Tensors:
            for now, before in zip(moved, old, strict=True):
                now.copy_(torch.where(self._running(i, now), now, before))
            return {n: torch.where(self._running(i, t), t, at[n]) if n in at else t for n, t in changed.items()}

        return undo


def pick(tensors: Tensors, i: int) -> Tensors:
    """One client's part of stacked tensors."""
    return {n: t[i] for n, t in tensors.items()}
