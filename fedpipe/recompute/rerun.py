"""Units that run again in the backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedpipe.recompute.stack import Dims, mapped, stacked


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(fn: Callable[..., tuple[Tensor, ...]], dims: Dims, *tensors: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = mapped(fn, dims)(*tensors)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fn, ctx.dims, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, fn: Callable[..., tuple[Tensor, ...]], dims: Dims, *tensors: Tensor) -> Any:
        if dims is not None:
            raise ValueError("recompute: a stack of stacks; wanted one client axis")
        dims, front = stacked(in_dims[2:], tensors)
        out = _Again.apply(fn, dims, *front)
        return out, (0,) * len(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = list(ctx.saved_tensors), ctx.needs_input_grad[2:]
        wanted = [i for i, need in enumerate(needs) if need]

        def value(*chosen: Tensor) -> Tensor:
            all_ = tensors.copy()
            for i, t in zip(wanted, chosen, strict=True):
                all_[i] = t
            out: Tensor = mapped(ctx.fn, ctx.dims)(*all_)[0]
            return out

        pull = torch.func.vjp(value, *(tensors[i] for i in wanted))[1]
        found = dict(zip(wanted, pull(grads[0]), strict=True))
        return (None, None, *(found.get(i) for i in range(len(tensors))))


def again(fn: Callable[..., tuple[Tensor, ...]], x: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
    """fn(x, *own), of which x and own alone are saved: the backward runs it again. Its first result has a gradient, the
    others, new values of buffers, have none. fn draws no random numbers and changes no tensor."""
    out: tuple[Tensor, ...] = _Again.apply(fn, None, x, *own)
    return out
