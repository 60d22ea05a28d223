"""Step `partition`: which client trains, validates and tests on which row, and what each client is given."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedpipe.config import Budgets, Run
from fedpipe.data.draw import Ints
from fedpipe.data.partitioners import Owner, clients_of, natural_ids, owners
from fedpipe.data.picture import draw
from fedpipe.data.share import histogram, test_owners, validation
from fedpipe.io import checksum, map_arrow, table_meta, write_bytes, write_table
from fedpipe.rng import rng
from fedpipe.steps import provenance
from fedpipe.studyfile import load_run

SPLITS = pa.array(["train", "val", "test"])
TRAIN, VAL, TEST = range(3)


def run(run: Path, data: Path, *, partition: Path, clients: Path) -> None:
    """Write `partition.parquet`, `clients.parquet` and, beside it, `histogram.svg` and `histogram.png`."""
    spec = load_run(run)
    table = map_arrow(data)
    meta = table_meta(table, str(data))
    count = spec.data.partition.clients
    y = table.column("label").to_numpy().astype(np.int64)
    rows, client, split = assign_rows(table, y, meta["classes"], spec)
    about = {
        **provenance("partition", spec, [data]),
        "kind": spec.data.partition.kind,
        "seed": spec.seed,
        "names": meta["names"],
    }
    labels = histogram(client[split == TRAIN], y[rows[split == TRAIN]], count, meta["classes"])
    val, test = (np.bincount(client[split == s], minlength=count) for s in (VAL, TEST))
    # Pictures first: with the tables there, the step counts as done.
    pictures = {clients.with_name(f"histogram.{kind}"): raw for kind, raw in draw(labels, meta["names"]).items()}
    for picture, raw in pictures.items():
        write_bytes(picture, raw)
    write_table(
        partition,
        pa.table(
            {"row": rows, "client": client, "split": pa.DictionaryArray.from_arrays(split, SPLITS).cast(pa.string())}
        ),
        about,
    )
    beside = {picture.name: checksum(picture) for picture in pictures}
    write_table(clients, clients_table(labels, val, test, spec.budgets), {**about, "beside": beside})


def assign_rows(table: pa.Table, y: Ints, classes: int, spec: Run) -> tuple[Ints, Owner, NDArray[np.int8]]:
    """Used rows of the data in ascending order, the client of each and its split (0 train, 1 val, 2 test)."""
    how = spec.data.partition
    is_test = table.column("test").to_numpy()
    ids = np.asarray(table.column("client").to_pylist()) if how.kind == "natural" and how.column else None
    train_ids = None if ids is None else ids[~is_test]
    owner = np.full(len(y), -1, np.int32)
    owner[~is_test] = owners(y[~is_test], classes, train_ids, how, rng(spec.seed, purpose="partition/train"))
    split = np.full(len(y), TEST, np.int8)
    used = np.flatnonzero(~is_test & (owner >= 0))
    split[used] = np.where(validation(owner[used], how.val, rng(spec.seed, purpose="partition/val")), VAL, TRAIN)
    trained = used[split[used] == TRAIN]
    labels = histogram(owner[trained], y[trained], how.clients, classes)
    known = None
    if ids is not None and train_ids is not None:
        known = clients_of(ids[is_test], natural_ids(train_ids, how))
    owner[is_test] = test_owners(y[is_test], labels, rng(spec.seed, purpose="partition/test"), known)
    rows = np.flatnonzero(owner >= 0)
    return rows, owner[rows], split[rows]


def clients_table(labels: Ints, val: Ints, test: Ints, budgets: Budgets) -> pa.Table:
    """One row per client: its rows by split and class, its budget's group and, null without a limit, its kind (bytes,
    width or fraction), value and name."""
    count, classes = labels.shape
    limits = budgets.limits(count)
    group = np.repeat(np.arange(len(limits)), [n for _, n in limits]) if limits else np.zeros(count, np.int64)
    given = [limits[g][0] for g in group] if limits else [None] * count
    flat = pa.array(labels.ravel().astype(np.int32))
    return pa.table(
        {
            "client": pa.array(np.arange(count, dtype=np.int32)),
            "samples": pa.array(labels.sum(1).astype(np.int32)),
            "val": pa.array(val.astype(np.int32)),
            "test": pa.array(test.astype(np.int32)),
            "labels": pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * classes), flat),
            "group": pa.array(group.astype(np.int32)),
            "kind": pa.array([g and g.kind for g in given], pa.string()),
            "value": pa.array([g and g.value for g in given], pa.float64()),
            "name": pa.array([g and g.name for g in given], pa.string()),
        }
    )
