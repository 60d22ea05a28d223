"""Normalisation + ReLU in plain torch: the formulas, 16 bits in float32.

Everything is seen as [clients, batch, groups, channels of a group, entries]; without groups every channel is its own.
"""

import math

import torch
from torch import Tensor


def _seen(x: Tensor, weight: Tensor, groups: int | None) -> Tensor:
    channels, clients = weight.shape[-1], weight.numel() // weight.shape[-1]
    many = groups or channels
    view = x.view(clients, x.shape[weight.dim() - 1], many, channels // many, -1)
    return view if x.dtype == torch.float64 else view.float()


def _affine(weight: Tensor, groups: int | None, like: Tensor) -> Tensor:
    return weight.to(like.dtype).view(len(like), 1, *like.shape[2:4], 1)


def _known(statistic: Tensor, groups: int | None, like: Tensor) -> Tensor:
    return statistic.view(len(like), like.shape[1] if groups else 1, like.shape[2], 1, 1)


def _dims(groups: int | None) -> tuple[int, ...]:
    return (3, 4) if groups else (1, 3, 4)


def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float,
              groups: int | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """h, and the mean and 1 / sqrt(variance + eps) it was made with."""
    v, dims = _seen(x, weight, groups), _dims(groups)
    # Four times as fast as var_mean. The mean of what is left corrects the sum's rounding, which an offset makes large.
    mean = v.mean(dims, keepdim=True)
    away = v - mean
    off = away.mean(dims, keepdim=True)
    rstd = torch.rsqrt(away.sub_(off).square_().mean(dims) + eps)
    shape = (*x.shape[: weight.dim()], groups) if groups else weight.shape
    mean, rstd = (mean + off).view(shape), rstd.view(shape)
    return norm_relu_again(x, mean, rstd, weight, bias, groups), mean, rstd


def norm_relu_again(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int | None) -> Tensor:
    """h of statistics that are known."""
    v = _seen(x, weight, groups)
    m, r = _known(mean, groups, v), _known(rstd, groups, v)
    w, b = (_affine(t, groups, v) for t in (weight, bias))
    return (v - m).mul_(r * w).add_(b).relu_().to(x.dtype).view(x.shape)


def norm_relu_backward(dh: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
                       groups: int | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias; what is left of dh is where the output is not 0."""
    v = _seen(x, weight, groups)
    m, r = _known(mean, groups, v), _known(rstd, groups, v)
    w, b = (_affine(t, groups, v) for t in (weight, bias))
    away = v - m
    dy = torch.ops.aten.threshold_backward(_seen(dh, weight, groups), (away * (r * w)).add_(b), 0)
    hat = away.mul_(r)
    first, second = dy.sum(4, keepdim=True), (dy * hat).sum(4, keepdim=True)
    dweight, dbias = (t.sum(1).to(weight.dtype).view(weight.shape) for t in (second, first))
    dims = _dims(groups)
    n = v.shape[4] * math.prod(first.shape[d] for d in dims)
    first, second = ((t * w).sum(dims, keepdim=True) / n for t in (first, second))
    dx = dy.mul_(w).sub_(first).sub_(hat.mul_(second)).mul_(r)
    return dx.to(x.dtype).view(x.shape), dweight, dbias
