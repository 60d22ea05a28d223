"""One phase of local training: its batches, its optimizer, its steps, for one client or a stack of them."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedpipe.config import Local, Optimizer
from fedpipe.context import Ctx, Grad
from fedpipe.errors import FedpipeError
from fedpipe.fused import Fused
from fedpipe.kernels.common import Backend
from fedpipe.types import Batch, Method, Phase, Tensors, matches

if TYPE_CHECKING:
    from fedpipe.client import Client

Slots = dict[str, dict[str, Any]]  # optimizer state by name


def optimizer(spec: Optimizer, leaves: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """The study's optimizer of these leaves, one after another: all at once takes another model's bytes on the way."""
    wd = spec.weight_decay
    if spec.name == "sgd":
        return torch.optim.SGD(leaves, lr=lr, momentum=spec.momentum, weight_decay=wd, foreach=False)
    kind = torch.optim.Adam if spec.name == "adam" else torch.optim.AdamW
    return kind(leaves, lr=lr, weight_decay=wd, foreach=False)


def default_loss(at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensor, Tensors]:
    logits, changed = ctx.forward(at, batch["x"])
    return ctx.task(logits, batch), changed


class PhaseRun:
    """One phase of one client or stack. kernel: what a fused step (`Phase.step`) runs by."""

    def __init__(
        self,
        method: Method,
        local: Local,
        clients: "list[Client]",
        phase: Phase,
        index: int,
        kernel: Backend = "auto",
    ):
        self.method, self.local, self.clients, self.phase = method, local, clients, phase
        self.stacked = len(clients) > 1
        self.rows = [c.batches(phase, index) for c in clients]
        self.counts = [len(r) for r in self.rows]
        lr = clients[0].ctx.lr * phase.lr
        self.ctx = replace(clients[0].ctx, client=None, samples=0, phase=phase, lr=lr, steps=max(self.counts))
        self.index, self.kernel = index, kernel
        self.fused: Fused | None = None
        self.ask = True

    def run(self, at: Tensors, carried: Slots) -> tuple[Tensors, Slots, list]:
        live = [n for n in at if matches(n, self.phase.live) and self._trainable(n, at[n])]
        if not live:
            raise FedpipeError(f"phase {self.phase.name}: no name fits live = {', '.join(self.phase.live)}")
        flat = bool(self.phase.step)  # a fused step sees flat views
        leaves = {n: (at[n].contiguous() if flat else at[n]).detach().requires_grad_() for n in live}
        opt = self._optimizer(leaves, carried)
        if self.phase.step:
            name, lr = self.method.name, self.ctx.lr
            self.fused = Fused(name, self.local, self.phase, lr, leaves, at, self.stacked, self.kernel)
        first = last = torch.zeros(())
        for step in range(max(self.counts)):
            at, value = self._step(step, {**at, **leaves}, leaves, opt)
            if value is not None:
                last = torch.where(self._running(step, value), value, last) if step else value
                first = first if step else value
        carry = {n: dict(opt.state[leaf]) for n, leaf in leaves.items()}
        at = {**at, **{n: leaf.detach() for n, leaf in leaves.items()}}
        pairs = zip(first, last, strict=True) if self.stacked else [(first, last)]
        return at, carry, [(n, a, b) for n, (a, b) in zip(self.counts, pairs, strict=True)]

    def _trainable(self, name: str, tensor: Tensor) -> bool:
        assert self.ctx.chain is not None
        return tensor.is_floating_point() and name.split("/")[-1] not in self.ctx.chain.buffer_names

    def _step(
        self, step: int, at: Tensors, leaves: Tensors, opt: torch.optim.Optimizer
    ) -> tuple[Tensors, Tensor | None]:
        batch = self._batch(step)
        at = {**at, **self._draw(step, at, batch)}
        value, changed, grads = self._gradient(at, batch, leaves)
        d, more = self._direction(at, batch, leaves, grads)
        changed = {**changed, **more}
        undo = self._remember(step, leaves, opt, {n: at[n] for n in changed if n in at})
        self._move(leaves, d, at, opt)
        return {**at, **undo(changed)}, value

    @torch.no_grad()
    def _move(self, leaves: Tensors, d: Tensors, at: Tensors, opt: torch.optim.Optimizer) -> None:
        if self.fused and self.fused.whole:
            self.fused(leaves, d, at, opt.state)
            return
        d = self.fused.direction(leaves, d, at) if self.fused else d
        for n, leaf in leaves.items():
            leaf.grad = d.get(n)
        opt.step()
        opt.zero_grad(set_to_none=True)
        if self.fused:
            self.fused.project(leaves)

    def _optimizer(self, leaves: Tensors, carried: Slots) -> torch.optim.Optimizer:
        opt = optimizer(self.local.optimizer, leaves.values(), self.ctx.lr)
        for n, leaf in leaves.items():
            if n in carried:
                opt.state[leaf] = carried[n]
        return opt

    def _batch(self, step: int) -> Batch:
        rows = [r[min(step, len(r) - 1)] for r in self.rows]
        size = max(len(r) for r in rows)
        parts = [c.load(r, size) for c, r in zip(self.clients, rows, strict=True)]
        return {k: torch.stack([p[k] for p in parts]) for k in parts[0]} if self.stacked else parts[0]

    def _draw(self, step: int, at: Tensors, batch: Batch) -> Tensors:
        draw = self.method.draw
        if draw is None:
            return {}
        gens = [c.noise(self.index, step) for c in self.clients]
        if not self.stacked:
            return draw(gens[0], at, batch, self.ctx)
        each = [draw(g, pick(at, i), pick(batch, i), self.ctx) for i, g in enumerate(gens)]
        return {n: torch.stack([e[n] for e in each]) for n in each[0]}

    def _loss(self, at: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        out = (self.method.loss or default_loss)(at, batch, self.ctx)
        return out if isinstance(out, tuple) else (out, {})

    def _gradient(self, at: Tensors, batch: Batch, leaves: Tensors) -> tuple[Tensor | None, Tensors, Tensors | None]:
        if not self.ask:
            return None, {}, None
        with torch.enable_grad():
            value, changed = torch.vmap(self._loss)(at, batch) if self.stacked else self._loss(at, batch)
            found = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
        grads = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
        return value.detach(), {n: t.detach() for n, t in changed.items()}, grads

    def _direction(self, at: Tensors, batch: Batch, leaves: Tensors, grads: Tensors | None) -> tuple[Tensors, Tensors]:
        direction = self.method.direction
        if direction is None:
            return grads or {}, {}
        oracles: list[Grad] = []

        def one(at: Tensors, batch: Batch, here: Tensors | None) -> tuple[Tensors, Tensors]:
            oracles.append(Grad(lambda a, b: self._loss(a, b)[0], tuple(leaves), here, at, batch))
            out: tuple[Tensors, Tensors] = direction(oracles[-1], at, batch, self.ctx)
            return out

        plain = {n: t.detach() for n, t in at.items()}
        with torch.no_grad():
            if self.stacked:
                out = (
                    torch.vmap(one)(plain, batch, grads)
                    if grads is not None
                    else torch.vmap(lambda a, b: one(a, b, None))(plain, batch)
                )
            else:
                out = one(plain, batch, grads)
        self.ask = self.ask and oracles[0].asked
        return out

    def _running(self, step: int, like: Tensor) -> Tensor:
        on = torch.tensor([step < n for n in self.counts], device=like.device)
        return (on if self.stacked else on[0]).reshape(like.shape[:1] + (1,) * (like.ndim - 1))

    def _remember(
        self, step: int, leaves: Tensors, opt: torch.optim.Optimizer, at: Tensors
    ) -> Callable[[Tensors], Tensors]:
        """Clients of a stack that have finished are put back after the step, optimizer state included."""
        if all(step < n for n in self.counts):
            return lambda changed: changed
        old = {n: leaf.detach().clone() for n, leaf in leaves.items()}
        slots = [(s, k, v.clone()) for leaf in leaves.values() for s in [opt.state[leaf]] for k, v in s.items()
                 if isinstance(v, Tensor) and v.shape == leaf.shape]  # fmt: skip

        def undo(changed: Tensors) -> Tensors:
            with torch.no_grad():
                for n, leaf in leaves.items():
                    leaf.copy_(torch.where(self._running(step, leaf), leaf, old[n]))
                for state, key, value in slots:
                    state[key].copy_(torch.where(self._running(step, value), state[key], value))
            return {n: torch.where(self._running(step, t), t, at[n]) if n in at else t for n, t in changed.items()}

        return undo


def pick(tensors: Tensors, i: int) -> Tensors:
    """One client's part of stacked tensors."""
    return {n: t[i] for n, t in tensors.items()}
