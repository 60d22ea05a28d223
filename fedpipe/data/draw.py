"""Shares in whole numbers, and draws by class: used both to choose rows and to give them to clients."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def apportion(weights: Ints, total: int) -> Ints:
    """Whole numbers [n] that add up to `total`, in proportion to whole `weights` [n]: the largest-remainder method.

    Exact integer arithmetic; equal remainders favour the lower position. No weight exceeds its own share's ceiling.
    """
    whole = int(weights.sum())
    if not whole:
        raise ValueError("weights add up to nothing")
    shares, remainders = np.divmod(weights * total, whole)
    short = total - int(shares.sum())
    shares[np.argsort(-remainders, kind="stable")[:short]] += 1
    return shares


def shuffled_by_class(y: NDArray[np.integer], generator: np.random.Generator) -> Ints:
    """Positions of `y` [n] in order of class, in random order within each class."""
    order = generator.permutation(len(y))
    return order[np.argsort(y[order], kind="stable")]


def draw_by_class(y: NDArray[np.integer], classes: int, count: int, generator: np.random.Generator) -> Ints:
    """`count` positions of `y` [n], ascending, every class in proportion to its rows."""
    per_class = np.bincount(y, minlength=classes)
    taken = apportion(per_class, count)
    within = np.arange(len(y)) - np.repeat(np.cumsum(per_class) - per_class, per_class)
    return np.sort(shuffled_by_class(y, generator)[within < np.repeat(taken, per_class)])


def deal(y: NDArray[np.integer], counts: Ints, generator: np.random.Generator) -> NDArray[np.int32]:
    """Who gets each position of `y` [n], when client k is due `counts[k, c]` rows of class c; which ones is random.

    The columns of `counts` [clients, classes] add up to the number of rows of each class.
    """
    clients, classes = counts.shape
    owner = np.empty(len(y), np.int32)
    due = np.tile(np.arange(clients, dtype=np.int32), classes)
    owner[shuffled_by_class(y, generator)] = np.repeat(due, counts.T.ravel())
    return owner
