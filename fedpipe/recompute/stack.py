"""One client or a stack of them: of every tensor, whether it has a client axis, in front."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Dims = tuple[int | None, ...] | None


def mapped(fn: Callable[..., Any], dims: Dims) -> Callable[..., Any]:
    """fn, for a stack of clients where there is one."""
    return fn if dims is None else torch.vmap(fn, in_dims=dims)


def stacked(in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> tuple[Dims, tuple[Tensor, ...]]:
    """Tensors with the client axis, where they have one, in front."""
    front = tuple(t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims, strict=True))
    return tuple(None if d is None else 0 for d in in_dims), front


def present(fn: Callable[..., tuple[Tensor | None, ...]], dims: Dims) -> Callable[..., tuple[Tensor | None, ...]]:
    """fn, mapped; results that are None stay so."""
    there: list[bool] = []

    def some(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = fn(*tensors)
        there[:] = [t is not None for t in out]
        return tuple(t for t in out if t is not None)

    def call(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        found = iter(mapped(some, dims)(*tensors))
        return tuple(next(found) if here else None for here in there)

    return call
