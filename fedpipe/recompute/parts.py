"""Parts of units: functions that are computed again, and products and convolutions that are not."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpipe.recompute.rebuilt import Needs, Pull
from fedpipe.recompute.stack import Dims, mapped


@dataclass(frozen=True)
class Pure:
    """A cheap part that is a function without state."""

    fn: Callable[..., Tensor]

    def forward(self, x: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        return (self.fn(x, *own),)

    def again(self, dims: Dims, kept: tuple[Tensor, ...], x: Tensor, *own: Tensor) -> tuple[Tensor, Pull]:
        # the gradient of a stack is taken around vmap, as the loop takes it: other orders round otherwise
        made = torch.func.vjp(mapped(self.fn, dims), x, *own)
        return made[0], made[1]


@dataclass(frozen=True)
class Conv:
    """A 3x3 convolution without bias."""

    stride: int = 1
    outputs: int = 1

    def forward(self, z: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        return (F.conv2d(z, own[0], None, self.stride, 1),)

    def backward(self, grads: tuple[Tensor, ...], needs: Needs, z: Tensor, *own: Tensor) -> tuple[Tensor | None, ...]:
        return _conv_backward(grads[0], z, own[0], self.stride, needs)


@dataclass(frozen=True)
class ConvAndShortcut:
    """A 3x3 convolution, and z itself or a 1x1 convolution of it, or of these every k-th pixel."""

    stride: int = 1
    every: int = 1
    outputs: int = 2

    def forward(self, z: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        if len(own) == 2:
            short = F.conv2d(z, own[1], None, self.stride * self.every)
        else:  # a copy: a view would keep all of z
            short = z[..., :: self.every, :: self.every].clone() if self.every > 1 else z
        return F.conv2d(z, own[0], None, self.stride, 1), short

    def backward(self, grads: tuple[Tensor, ...], needs: Needs, z: Tensor, *own: Tensor) -> tuple[Tensor | None, ...]:
        gz, gw = _conv_backward(grads[0], z, own[0], self.stride, needs[:2])
        if len(own) == 2:
            short, gw1 = _conv_backward(grads[1], z, own[1], self.stride * self.every, needs[::2])
            return None if gz is None or short is None else gz + short, gw, gw1
        if gz is None or self.every == 1:
            return None if gz is None else gz + grads[1], gw
        gz[..., :: self.every, :: self.every] += grads[1]
        return gz, gw


@dataclass(frozen=True)
class Linear:
    """x W^T + b over the last dimension."""

    outputs: int = 1

    def forward(self, z: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        return (F.linear(z, *own),)

    def backward(self, grads: tuple[Tensor, ...], needs: Needs, z: Tensor, *own: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0].flatten(0, -2)
        gw = g.t() @ z.flatten(0, -2) if needs[1] else None
        return grads[0] @ own[0] if needs[0] else None, gw, *([g.sum(0)] if len(own) == 2 else [])


def _conv_backward(g: Tensor, z: Tensor, w: Tensor, stride: int, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z and w, as torch's autograd computes them."""
    padding = w.shape[-1] // 2
    gz, gw, _ = torch.ops.aten.convolution_backward(
        g, z, w, None, [stride, stride], [padding, padding], [1, 1], False, [0, 0], 1, [*needs, False]
    )
    return gz, gw
