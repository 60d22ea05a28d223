"""Norm, ReLU, then a convolution: of the three only the norm's input is saved. Layer norm by liger's kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.kernels import liger
from fedpipe.kernels import norm as kernels
from fedpipe.kernels.common import Backend, chosen
from fedpipe.recompute import Cheap, Dims, Last, Pull, Pure, mapped, rebuilt


class _Call(torch.autograd.Function):
    """A kernel's call, which takes a stack of clients as it is. It has no gradient."""

    @staticmethod
    def forward(fn: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return fn(*(t.contiguous() for t in tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, fn: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Any:
        stack = [_every(t if d is None else t.movedim(d, 0), d is not None, info.batch_size)
                 for t, d in zip(tensors, in_dims[1:], strict=True)]  # fmt: skip
        out = _Call.apply(fn, *stack)
        return out, (0,) * len(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("a kernel's call has no gradient")


def _every(t: Tensor, has: bool, clients: int) -> Tensor:
    """A tensor with a client axis, given to all of them where it has none."""
    return t if has else t.expand(clients, *t.shape)


class _LayerNorm(torch.autograd.Function):
    """y, and the statistics backward needs; of a stack in one call, whose weights have a client axis or none."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return liger.layer_norm(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:2], *output[1:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        x, *own = (t if d is None else t.movedim(d, 0) for t, d in zip((x, weight, bias), in_dims[:3], strict=True))
        has = [d is not None for d in in_dims[:3]]
        if any(has[1:]):
            own = [_every(t, h, info.batch_size) for t, h in zip(own, has[1:], strict=True)]
        return _LayerNorm.apply(_every(x, has[0], info.batch_size), *own, eps), (0, 0, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        return *_Call.apply(liger.layer_norm_backward, grad, x, mean, rstd, weight), None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: Backend) -> Tensor:
    """Layer norm of x [..., dim] by weight and bias [dim]: liger's where it runs (`liger.runs`), torch's elsewhere.

    Liger's is differentiable once.
    """
    if not liger.runs(backend, x):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    out: Tensor = _LayerNorm.apply(x, weight, bias, eps)[0]
    return out


@dataclass(frozen=True)
class Fused:
    """Batch or group norm and ReLU by the kernels, which keep the statistics. running: momentum, where running
    statistics are among the own tensors; the new ones are given back, changed once."""

    eps: float
    groups: int | None
    running: float | None
    backend: Backend

    def _of(self, op: Callable[..., Any], **settings: Any) -> Callable[..., tuple[Tensor, ...]]:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            out = op(*tensors, groups=self.groups, backend=self.backend, **settings)
            return out if isinstance(out, tuple) else (out,)

        return call

    def forward(self, x: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        h, mean, rstd = _Call.apply(self._of(kernels.norm_relu, eps=self.eps), x, *own[:2])
        if self.running is None:
            return h, mean, rstd
        n = x.numel() // x.shape[1]
        var = (rstd**-2 - self.eps) * n / max(1, n - 1)
        new = (old + self.running * (now.to(old.dtype) - old) for old, now in zip(own[2:], (mean, var), strict=True))
        return h, mean, rstd, *new

    def again(self, dims: Dims, kept: tuple[Tensor, ...], x: Tensor, *own: Tensor) -> tuple[Tensor, Pull]:
        shared = [dims is not None and d is None for d in dims or (0, 0, 0)]
        clients = len(kept[0])
        x, w, b = (_every(t, not s, clients) for t, s in zip((x, *own[:2]), shared, strict=False))
        (z,) = _Call.apply(self._of(kernels.norm_relu_again), x, *kept[:2], w, b)

        def pull(g: Tensor) -> tuple[Tensor | None, ...]:
            back = _Call.apply(self._of(kernels.norm_relu_backward), g, x, *kept[:2], w, b)
            grads = (t.sum(0) if s else t for t, s in zip(back, shared, strict=False))
            return *grads, *(None,) * (len(own) - 2)

        return z, pull


@dataclass(frozen=True)
class Running:
    """Batch norm and ReLU by the statistics of the batch in plain torch; running ones are given back, changed once."""

    momentum: float
    eps: float

    def forward(self, x: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        weight, bias, mean, var = *own[:2], own[2].clone(), own[3].clone()
        return F.relu(F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)), mean, var

    def again(self, dims: Dims, kept: tuple[Tensor, ...], x: Tensor, *own: Tensor) -> tuple[Tensor, Pull]:
        def pure(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.relu(F.batch_norm(x, None, None, weight, bias, True, self.momentum, self.eps))

        made = torch.func.vjp(mapped(pure, dims and dims[:3]), x, *own[:2])
        return made[0], lambda g: (*made[1](g), None, None)


def norm_relu(norm: nn.Module, x: Tensor, last: Last, then: tuple[Tensor, ...], backend: Backend) -> tuple[Tensor, ...]:
    """last(relu(norm(x)), *then), of which x, parameters and statistics are saved; running statistics change once.

    Raises ValueError for norms other than BatchNorm2d with a momentum and GroupNorm, both affine.
    """
    if not isinstance(norm, nn.BatchNorm2d | nn.GroupNorm) or norm.weight is None:
        raise ValueError(f"level 1: {type(norm).__name__}; wanted an affine BatchNorm2d or GroupNorm")
    own: tuple[Tensor, ...] = (norm.weight, norm.bias)
    fused = chosen(backend, x) and x.dtype != torch.float64
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
        if norm.training:
            return _running(norm, x, last, own, then, backend if fused else None)
        fused = False  # statistics are given
    cheap: Cheap = Pure(_function(norm))
    if fused:
        cheap = Fused(norm.eps, norm.num_groups if isinstance(norm, nn.GroupNorm) else None, None, backend)
    return rebuilt(cheap, last, x, own, then)[: last.outputs]


def _running(
    norm: nn.BatchNorm2d, x: Tensor, last: Last, own: tuple[Tensor, ...], then: tuple[Tensor, ...],
    fused: Backend | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if norm.momentum is None or norm.running_var is None or norm.num_batches_tracked is None:
        raise ValueError("level 1: a batch norm with momentum None; wanted a number")
    assert norm.running_mean is not None
    running = norm.running_mean.clone(), norm.running_var.clone()  # what is saved must not change with them
    cheap: Cheap = Fused(norm.eps, None, norm.momentum, fused) if fused else Running(norm.momentum, norm.eps)
    out = rebuilt(cheap, last, x, (*own, *running), then)
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.copy_(out[-2])
        norm.running_var.copy_(out[-1])
    return out[: last.outputs]


def _function(norm: nn.BatchNorm2d | nn.GroupNorm) -> Callable[..., Tensor]:
    if isinstance(norm, nn.GroupNorm):
        groups, eps = norm.num_groups, norm.eps
        return lambda x, w, b: F.relu(F.group_norm(x, groups, w, b, eps))
    mean, var, eps = norm.running_mean, norm.running_var, norm.eps  # given in evaluation only
    return lambda x, w, b: F.relu(F.batch_norm(x, mean, var, w, b, mean is None, 0.0, eps))
