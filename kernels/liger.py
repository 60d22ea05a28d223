"""LayerNorm by the kernels of liger-kernel, a library that need not be there (extra `gpu`): forward and backward.

y = (x - mean) rstd weight + bias over the last dimension, rstd = 1 / sqrt(variance + eps) with the biased variance
(arXiv 1607.06450). Taken are its calls on plain tensors: its autograd Function is refused by `torch.func`. They are no
folder with a reference of their own, because the reference is torch's.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor, bfloat16, float16, float32

from fedpipe.kernels.common import Backend, chosen, wanted

FLOATS = (float32, bfloat16, float16)
WIDEST = 65536  # entries of a row: liger has it in one tile


def runs(backend: Backend, x: Tensor) -> bool:
    """Whether liger's kernels run for x [..., dim]: where Triton's do (`chosen`), if they can and are installed."""
    able = x.dtype in FLOATS and 0 < x.shape[-1] <= WIDEST and x.numel() > 0
    return chosen(backend, x) and able and _ops() is not None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of x [..., dim]; y in x's type, statistics [...] in float32.

    weight, bias: [dim], in x's type; or [clients, dim], and x has a leading client axis. Raises ValueError for wrong
    types, shapes and devices.
    """
    _check(x, weight, bias)
    if not eps > 0:
        raise ValueError(f"eps: {eps}; wanted a number > 0")

    def one(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y, _, mean, rstd, *_ = _ops().layer_norm_forward(x, weight, bias, eps)
        return y, mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])

    y, mean, rstd = _each(one, weight.dim() == 2, x, weight, bias)
    return y, mean, rstd


def layer_norm_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
                        weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias) of dy, in the types of x and weight; sums in float32, in one order."""
    _check(x, weight, weight)
    wanted("dy", dy, (x.dtype,), tuple(x.shape), x)
    for name, t in (("mean", mean), ("rstd", rstd)):
        wanted(name, t, (float32,), tuple(x.shape[:-1]), x)

    def one(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        # of the bias it asks for the type alone
        return _ops().layer_norm_backward(dy, x.view(-1, x.shape[-1]), weight, weight, mean.view(-1), rstd.view(-1))

    dx, dweight, dbias = _each(one, weight.dim() == 2, dy, x, mean, rstd, weight)
    return dx, dweight, dbias


@cache
def _ops() -> Any:
    """liger's module of these calls; None where it is not installed. One that does not load is an error: what runs
    must not depend on that."""
    return import_module("liger_kernel.ops.layer_norm") if find_spec("liger_kernel") else None


def _each(call: Callable[..., tuple[Tensor, ...]], stacked: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """One call; of a stack one a client, because a launch takes one weight. Beside the results only one client's are
    held."""
    if not stacked:
        return call(*tensors)
    clients, out = len(tensors[0]), tuple[Tensor, ...]()
    for i in range(clients):
        found = call(*(t[i] for t in tensors))
        out = out or tuple(t.new_empty((clients, *t.shape)) for t in found)
        for all_, mine in zip(out, found, strict=True):
            all_[i] = mine
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    wanted("x", x, FLOATS)
    if weight.dim() not in (1, 2):
        raise ValueError(f"weight: shape {tuple(weight.shape)}; wanted [dim] or [clients, dim]")
    if x.dim() < weight.dim() or not x.numel() or x.shape[-1] > WIDEST:
        axes = "[..., dim]" if weight.dim() == 1 else "[clients, ..., dim]"
        raise ValueError(f"x: shape {tuple(x.shape)}; wanted {axes}, none of them 0, dim at most {WIDEST}")
    shape = (*x.shape[: weight.dim() - 1], x.shape[-1])
    wanted("weight", weight, (x.dtype,), shape, x)
    wanted("bias", bias, (x.dtype,), shape, x)
