"""Validation and test rows of clients, once their training rows are known."""

import numpy as np
from numpy.typing import NDArray

from fedpipe.data.draw import Ints, apportion, deal


def histogram(owner: NDArray[np.int32], y: Ints, clients: int, classes: int) -> Ints:
    """Rows [clients, classes] that each client has of each class."""
    return np.bincount(owner.astype(np.int64) * classes + y, minlength=clients * classes).reshape(clients, classes)


def validation(owner: NDArray[np.int32], share: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Which rows [n] are set aside: of each client's rows the given share, rounded down."""
    order = generator.permutation(len(owner))
    order = order[np.argsort(owner[order], kind="stable")]
    sizes = np.bincount(owner)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    aside = np.empty(len(owner), bool)
    aside[order] = place < np.repeat(np.floor(share * sizes), sizes)
    return aside


def test_owners(
    y: Ints, labels: Ints, generator: np.random.Generator, known: NDArray[np.int32] | None = None
) -> NDArray[np.int32]:
    """The client of each test row int32 [n]: of every class in proportion to its training rows.

    `labels` [clients, classes] are training rows. Classes nobody trains on follow the clients' sizes. `known` [n] are
    the clients of rows with natural ids, -1 for those to be given by proportion.
    """
    owner = np.full(len(y), -1, np.int32) if known is None else known.copy()
    free = owner < 0
    due = np.zeros_like(labels)
    for c, rows in enumerate(np.bincount(y[free], minlength=labels.shape[1])):
        if rows:
            due[:, c] = apportion(labels[:, c] if labels[:, c].any() else labels.sum(1), int(rows))
    owner[free] = deal(y[free], due, generator)
    return owner
