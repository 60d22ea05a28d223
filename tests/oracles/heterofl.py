"""HeteroFL's slices and its mean, entry by entry. arXiv 2010.01264, section 3; published code, src/fed.py."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def part(shape: tuple[int, ...], rate: float, first: bool, last: bool) -> tuple[int, ...]:
    """Sizes of a client's part of a weight [out, in, ...] or a vector [out]: the first ceil(rate C) of each, but all
    inputs of the first layer and all outputs of the last."""
    size = list(shape)
    if not last:
        size[0] = math.ceil(rate * shape[0])
    if len(shape) > 1 and not first:
        size[1] = math.ceil(rate * shape[1])
    return tuple(size)


def mean(old: Array, parts: Sequence[Array]) -> Array:
    """Every entry: the plain mean of the clients that hold it, the old value where none does."""
    new = np.empty_like(old)
    for at in itertools.product(*(range(n) for n in old.shape)):
        held = [p[at] for p in parts if all(i < n for i, n in zip(at, p.shape, strict=True))]
        new[at] = sum(held) / len(held) if held else old[at]
    return new


def rolled(shape: tuple[int, ...], rate: float, first: bool, last: bool, round: int) -> list[list[int]]:
    """FedRolex (arXiv 2212.01548): entries of each dimension that a client holds in a round counted from 0: as many as
    HeteroFL's, from -round mod C on, round the end."""
    sizes = part(shape, rate, first, last)
    return [[(j - round) % n if k < n else j for j in range(k)] for n, k in zip(shape, sizes, strict=True)]


def mean_of(old: Array, parts: Sequence[tuple[list[list[int]], Array]]) -> Array:
    """`mean` of parts that say which entries they are."""
    total, count = np.zeros_like(old), np.zeros_like(old)
    for where, values in parts:
        for inside in itertools.product(*(range(n) for n in values.shape)):
            at = tuple(where[d][i] for d, i in enumerate(inside))
            total[at] += values[inside]
            count[at] += 1
    return np.where(count > 0, total / np.maximum(count, 1), old)
