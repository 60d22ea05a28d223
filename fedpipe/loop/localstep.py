"""One local step as a method's hooks have it: the loss, its gradient, the direction; of one client or a stack."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedpipe.context import Ctx, Grad
from fedpipe.types import Batch, Method, Tensors

Loss = Callable[[Tensors, Batch, Ctx], Any]
Outcome = tuple[Tensor | None, Tensors, Tensors]  # value, names changed, direction by live name


def default_loss(at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensor, Tensors]:
    logits, changed = ctx.forward(at, batch["x"])
    return ctx.task(logits, batch), changed


class LocalStep:
    """The step of a method for live names. A stack's hooks are vmapped; autograd runs around the vmapped loss.

    loss: the phase's, None for the default; still: of the live names, those whose gradient is 0;
    turn: called between the forward and the backward.
    """

    def __init__(self, method: Method, loss: Loss | None, live: tuple[str, ...], still: tuple[str, ...], stacked: bool,
                 turn: Callable[[], None] | None = None):  # fmt: skip
        self.method, self.loss, self.stacked, self.turn = method, loss or default_loss, stacked, turn
        self.still, self.live = still, tuple(n for n in live if n not in still)
        self.ask = True  # whether `direction` asks for the gradient at the current point

    def __call__(self, at: Tensors, batch: Batch, ctx: Ctx) -> Outcome:
        leaves = {n: at[n].detach().requires_grad_() for n in self.live}
        value, changed, grads = self._gradient({**at, **leaves}, batch, ctx, leaves)
        d, more = self._direction({**at, **leaves}, batch, ctx, grads)
        return value, {**changed, **more}, {**d, **{n: torch.zeros_like(at[n]) for n in self.still}}

    def _loss(self, at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensor, Tensors]:
        out = self.loss(at, batch, ctx)
        return out if isinstance(out, tuple) else (out, {})

    def _gradient(
        self, at: Tensors, batch: Batch, ctx: Ctx, leaves: Tensors
    ) -> tuple[Tensor | None, Tensors, Tensors | None]:
        if not self.ask:
            return None, {}, None

        def loss(at: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
            return self._loss(at, batch, ctx)

        with torch.enable_grad():
            value, changed = torch.vmap(loss)(at, batch) if self.stacked else loss(at, batch)
            if self.turn:
                self.turn()
            found = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
        grads = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
        return value.detach(), {n: t.detach() for n, t in changed.items()}, grads

    def _direction(self, at: Tensors, batch: Batch, ctx: Ctx, grads: Tensors | None) -> tuple[Tensors, Tensors]:
        direction = self.method.direction
        if direction is None:
            return grads or {}, {}
        oracles: list[Grad] = []

        def one(at: Tensors, batch: Batch, here: Tensors | None) -> tuple[Tensors, Tensors]:
            oracles.append(Grad(lambda a, b: self._loss(a, b, ctx)[0], self.live, here, at, batch))
            out: tuple[Tensors, Tensors] = direction(oracles[-1], at, batch, ctx)
            return out

        plain = {n: t.detach() for n, t in at.items()}
        with torch.no_grad():
            out: Any
            if not self.stacked:
                out = one(plain, batch, grads)
            elif grads is None:
                out = torch.vmap(lambda a, b: one(a, b, None))(plain, batch)
            else:
                out = torch.vmap(one)(plain, batch, grads)
        self.ask = self.ask and oracles[0].asked
        return out
