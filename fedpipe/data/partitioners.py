"""Who gets which training row. Every partitioner is vectorised and draws from the one generator it is given.

A partitioner takes labels int64 [n], the number of classes, the study's keys and a generator, and returns the client of
each row, int32 [n].
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedpipe.config import Partition
from fedpipe.data.draw import Ints, deal, shuffled_by_class
from fedpipe.errors import FedpipeError

Owner = NDArray[np.int32]
TRIES = 1000
_TINY = np.finfo(np.float64).tiny


def owners(
    y: Ints, classes: int, ids: NDArray[np.str_] | None, spec: Partition, generator: np.random.Generator
) -> Owner:
    """The client of each training row int32 [n]; -1 where natural ids leave a row unused.

    Raises `FedpipeError` when the rows cannot give every client `min_samples`, or the kind is unknown.
    """
    if spec.clients * spec.min_samples > len(y):
        raise FedpipeError(
            f"data.partition.clients: {spec.clients} clients with min_samples {spec.min_samples} "
            f"need {spec.clients * spec.min_samples} training rows, there are {len(y)}"
        )
    if spec.kind == "natural":
        if ids is None:
            raise FedpipeError("data.partition.column: kind natural needs the column of client ids")
        return clients_of(ids, natural_ids(ids, spec))
    if spec.kind in PARTITIONERS:
        owner = PARTITIONERS[spec.kind](y, classes, spec, generator)
    elif "." in spec.kind:
        from fedpipe.data.flower import by_class_path

        owner = by_class_path(y, ids, spec, generator)
    else:
        known = ", ".join([*PARTITIONERS, "natural"])
        raise FedpipeError(f"data.partition.kind: unknown {spec.kind!r}; wanted {known}, or a partitioner's class path")
    fewest = int(np.bincount(owner, minlength=spec.clients).min())
    if fewest < spec.min_samples:
        raise FedpipeError(
            f"data.partition: kind {spec.kind} left a client {fewest} rows, min_samples is {spec.min_samples}"
        )
    return owner


def iid(y: Ints, classes: int, spec: Partition, generator: np.random.Generator) -> Owner:
    """Rows at random, in numbers that differ by at most one."""
    owner = np.empty(len(y), np.int32)
    owner[generator.permutation(len(y))] = _parts(len(y), spec.clients)
    return owner


def dirichlet(y: Ints, classes: int, spec: Partition, generator: np.random.Generator) -> Owner:
    """Each class is shared out by proportions ~ Dir(alpha) over clients, drawn again until all have `min_samples`.

    Yurochkin et al. 2019 (1905.12022), Li et al. 2022 (2102.02079), without their stop for full clients: that is `dir`.
    """
    return _redrawn(y, classes, spec, generator, capped=False)


def dirichlet_capped(y: Ints, classes: int, spec: Partition, generator: np.random.Generator) -> Owner:
    """`dir` of FeDepth (2303.04887): as `dirichlet`, but a client that has its average share gets no further class.

    The published code asks for 50 rows a client (`min_samples: 50`).
    """
    return _redrawn(y, classes, spec, generator, capped=True)


def _redrawn(y: Ints, classes: int, spec: Partition, generator: np.random.Generator, capped: bool) -> Owner:
    per_class = np.bincount(y, minlength=classes)
    for _ in range(TRIES):
        counts = _proportions(per_class, spec, generator, capped)
        if counts is not None and counts.sum(1).min() >= spec.min_samples:
            return deal(y, counts, generator)
    raise FedpipeError(
        f"data.partition: {TRIES} draws with alpha {spec.alpha} never gave each of {spec.clients} clients "
        f"min_samples {spec.min_samples} of {len(y)} rows; raise alpha, or lower min_samples or clients"
    )


def _proportions(per_class: Ints, spec: Partition, generator: np.random.Generator, capped: bool) -> Ints | None:
    """Rows due [clients, classes]; None when all of a draw's weight falls on clients that are full."""
    counts = np.zeros((spec.clients, len(per_class)), np.int64)
    held = np.zeros(spec.clients, np.int64)
    for c, rows in enumerate(per_class):
        share = generator.dirichlet(np.full(spec.clients, spec.alpha))
        if capped:
            share = share * (held < per_class.sum() / spec.clients)
            if not share.sum() > 0:
                return None
            share /= share.sum()
        cuts = np.minimum((np.cumsum(share) * rows).astype(np.int64), rows)
        cuts[-1] = rows
        counts[:, c] = np.diff(cuts, prepend=0)
        held += counts[:, c]
    return counts


def balanced_dirichlet(y: Ints, classes: int, spec: Partition, generator: np.random.Generator) -> Owner:
    """`balanced-dir` of FeDepth (2303.04887): equal numbers of rows, a client's class weights ~ Dir(alpha).

    Clients choose in order, without replacement, from what is left. Where the rows do not divide, the numbers differ by
    one; the published code leaves the remainder unused.
    """
    left = np.bincount(y, minlength=classes)
    due = np.bincount(_parts(len(y), spec.clients), minlength=spec.clients)
    counts = np.zeros((spec.clients, classes), np.int64)
    for k in range(spec.clients):
        weights = generator.dirichlet(np.full(classes, spec.alpha))
        counts[k] = _weighted(weights, left, int(due[k]), generator)
        left = left - counts[k]
    return deal(y, counts, generator)


def _weighted(weights: NDArray[np.float64], left: Ints, due: int, generator: np.random.Generator) -> Ints:
    """How many rows of each class [classes] a weighted draw without replacement of `due` rows takes.

    Such a draw keeps the `due` smallest of Exp(1)/weight over all rows left. Within a class only the order statistics
    matter, and those are sums of exponential gaps, so `due` numbers a class are enough, however many rows it has.
    Logarithms keep classes of vanishing weight in order behind the others.
    """
    nth = np.arange(due)
    gaps = generator.exponential(size=(len(left), due)) / np.maximum(left[:, None] - nth, 1)
    keys = np.log(np.maximum(np.cumsum(gaps, axis=1), _TINY)) - np.log(np.maximum(weights, _TINY))[:, None]
    keys[nth >= left[:, None]] = np.inf
    first = np.argpartition(keys.ravel(), due - 1)[:due]
    return np.bincount(first // due, minlength=len(left))


def shards(y: Ints, classes: int, spec: Partition, generator: np.random.Generator) -> Owner:
    """McMahan et al. 2017 (1602.05629): rows in order of label are cut into equal shards, each client gets some."""
    count = spec.clients * spec.shards
    if count > len(y):
        raise FedpipeError(
            f"data.partition.shards: {spec.clients} clients of {spec.shards} shards need {count} training rows, "
            f"there are {len(y)}"
        )
    owner = np.empty(len(y), np.int32)
    client_of = (generator.permutation(count) // spec.shards).astype(np.int32)
    owner[shuffled_by_class(y, generator)] = client_of[_parts(len(y), count)]
    return owner


def natural_ids(ids: NDArray[np.str_], spec: Partition) -> list[str]:
    """The ids that are clients 0, 1, ...: the first in order of those with `min_samples` training rows."""
    values, rows = np.unique(ids, return_counts=True)
    enough: list[str] = values[rows >= spec.min_samples].tolist()
    if len(enough) < spec.clients:
        raise FedpipeError(
            f"data.partition.clients: {spec.clients}, but column {spec.column!r} has {len(enough)} ids "
            f"with min_samples {spec.min_samples} training rows"
        )
    if all(v.isdecimal() for v in enough):
        enough.sort(key=int)
    return enough[: spec.clients]


def clients_of(ids: NDArray[np.str_], chosen: list[str]) -> Owner:
    """The client whose id stands in each row; -1 for an id that is no client's."""
    values, position = np.unique(ids, return_inverse=True)
    client = {name: k for k, name in enumerate(chosen)}
    return np.array([client.get(v, -1) for v in values.tolist()], np.int32)[position]


def _parts(n: int, parts: int) -> Ints:
    """Which of `parts` consecutive parts, equal up to one, each of n positions belongs to."""
    return np.arange(n) * parts // n


PARTITIONERS: dict[str, Callable[[Ints, int, Partition, np.random.Generator], Owner]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "dir": dirichlet_capped,
    "balanced-dir": balanced_dirichlet,
    "shards": shards,
}
