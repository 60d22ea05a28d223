"""Partitioners by class path: those of flwr-datasets, and others with the same three attributes."""

import importlib
import inspect
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe.config import Partition
from fedpipe.data.draw import Ints
from fedpipe.errors import FedpipeError


def by_class_path(
    y: Ints, ids: NDArray[np.str_] | None, spec: Partition, generator: np.random.Generator
) -> NDArray[np.int32]:
    """The client of each row int32 [n] according to `spec.kind(**spec.settings)`.

    The partitioner sees columns `label`, `client` (with natural ids) and `row`. `num_partitions`, `partition_by` and
    `seed` are filled in where it takes them and the settings do not give them.
    """
    import datasets

    rows = datasets.Dataset.from_dict(
        {"row": np.arange(len(y)), "label": y, **({} if ids is None else {"client": ids.tolist()})}
    )
    make = _load(spec.kind)
    given = {"num_partitions": spec.clients, "partition_by": "label", "seed": int(generator.integers(2**31))}
    takes = inspect.signature(make).parameters
    owner = np.full(len(y), -1, np.int32)
    try:
        partitioner = make(**({k: v for k, v in given.items() if k in takes} | spec.settings))
        partitioner.dataset = rows
        for client in range(spec.clients):
            owner[partitioner.load_partition(client)["row"]] = client
        count = partitioner.num_partitions
    except Exception as e:
        raise FedpipeError(f"data.partition: {spec.kind} failed: {' '.join(str(e).split())}") from e
    if count != spec.clients or (owner < 0).any():
        raise FedpipeError(
            f"data.partition: {spec.kind} made {count} partitions and left {int((owner < 0).sum())} rows out; "
            f"wanted data.partition.clients = {spec.clients} and every row"
        )
    return owner


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when the package is first imported
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as e:
        how = "; it comes with: pip install 'fedpipe[flower]'" if (e.name or "").startswith("flwr") else ""
        raise FedpipeError(f"data.partition.kind: {path}: no module {e.name!r}{how}") from e
    except AttributeError as e:
        raise FedpipeError(f"data.partition.kind: {path}: {module} has no {name!r}") from e
