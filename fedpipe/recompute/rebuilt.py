"""A cheap part and what follows it: of the first the input is saved, not the output."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fedpipe.recompute.stack import Dims, mapped, present, stacked

Needs = tuple[bool, ...]
Pull = Callable[[Tensor], tuple[Tensor | None, ...]]


class Cheap(Protocol):
    """What is computed again: z of x and its own tensors; `forward` may give more, which is kept and has no gradient:
    statistics, new values of buffers. dims: of each tensor 0 or None, where there is a client axis."""

    def forward(self, x: Tensor, *own: Tensor) -> tuple[Tensor, ...]: ...

    def again(self, dims: Dims, kept: tuple[Tensor, ...], x: Tensor, *own: Tensor) -> tuple[Tensor, Pull]:
        """z, and from the gradient of z those of x and the own tensors."""
        ...


class Last(Protocol):
    """What is not: outputs of z and its own tensors, and a backward that needs z and no output."""

    @property
    def outputs(self) -> int: ...

    def forward(self, z: Tensor, *own: Tensor) -> tuple[Tensor, ...]: ...

    def backward(
        self, grads: tuple[Tensor, ...], needs: Needs, z: Tensor, *own: Tensor
    ) -> tuple[Tensor | None, ...]: ...


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(cheap: Cheap, last: Last, count: int, dims: Dims, *tensors: Tensor) -> tuple[Tensor, ...]:
        def both(x: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
            z, *kept = cheap.forward(x, *own[:count])
            return (*last.forward(z, *own[count:]), *kept)

        out: tuple[Tensor, ...] = mapped(both, dims)(*tensors)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cheap, ctx.last, ctx.count, ctx.dims, *tensors = inputs
        kept = output[ctx.last.outputs :]
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*tensors, *kept)
        ctx.tensors = len(tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, cheap: Cheap, last: Last, count: int, dims: Dims, *tensors: Tensor) -> Any:
        if dims is not None:
            raise ValueError("recompute: a stack of stacks; wanted one client axis")
        dims, front = stacked(in_dims[4:], tensors)
        out = _Rebuilt.apply(cheap, last, count, dims, *front)
        return out, (0,) * len(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *own = ctx.saved_tensors[: ctx.tensors]
        kept, dims, count, last = ctx.saved_tensors[ctx.tensors :], ctx.dims, ctx.count, ctx.last
        needs = ctx.needs_input_grad[4:]
        z, pull = ctx.cheap.again(dims and dims[: 1 + count], kept, x, *own[:count])
        asked = (any(needs[: 1 + count]), *needs[1 + count :])
        outputs = grads[: last.outputs]

        def back(*t: Tensor) -> tuple[Tensor | None, ...]:
            found: tuple[Tensor | None, ...] = last.backward(t[: len(outputs)], asked, *t[len(outputs) :])
            return found

        gz, *rest = present(back, dims and ((0,) * len(outputs) + (0, *dims[1 + count :])))(*outputs, z, *own[count:])
        gx = pull(gz) if gz is not None else (None,) * (1 + count)
        return (None, None, None, None, *gx, *_summed(rest, dims and dims[1 + count :]))


def _summed(grads: Any, dims: Any) -> tuple[Tensor | None, ...]:
    """Of a tensor that all clients share the gradient is the sum over them."""
    return tuple(g.sum(0) if g is not None and dims is not None and dims[i] is None else g for i, g in enumerate(grads))


def rebuilt(
    cheap: Cheap, last: Last, x: Tensor, own: tuple[Tensor, ...], then: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """last(cheap(x, *own), *then), and what `cheap` keeps; saved are x, own, then and what is kept, never cheap's z."""
    out: tuple[Tensor, ...] = _Rebuilt.apply(cheap, last, len(own), None, x, *own, *then)
    return out
