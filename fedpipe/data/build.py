"""The decoded data of a study: which rows, their pixels, labels and natural client ids, as one Arrow table."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedpipe.config import Data
from fedpipe.data.decode import decode, moments
from fedpipe.data.draw import draw_by_class
from fedpipe.data.sources import Split, read
from fedpipe.errors import FedpipeError
from fedpipe.rng import rng

DIGITS_SIZE = 16
TEST_SHARE = 5  # one row in five


def build(spec: Data) -> tuple[pa.Table, dict[str, Any]]:
    """The table of `data.arrow` and its metadata: training rows first, each split in its source's order.

    Columns image fixed_size_list<uint8>[C*H*W], label int32, test bool, and client string with natural ids.
    Which rows are drawn does not depend on a run's seed: every run of a study sees the same ones.
    """
    train, test, source = read(spec)
    train, test, names = _numbered(train, test)
    if test is None:
        train, test = _split(train, len(names))
    if spec.rows is not None:
        train, test = _subset(train, test, len(names), spec.rows)
    size = DIGITS_SIZE if spec.size is None and spec.name == "digits" else spec.size
    pixels = decode(train.images + test.images, size)
    n = len(train.labels)
    mean, std = moments(pixels[:n])
    columns = {
        "image": pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), int(np.prod(pixels.shape[1:]))),
        "label": pa.array(np.concatenate([train.labels, test.labels]).astype(np.int32)),
        "test": pa.array(np.arange(len(pixels)) >= n),
    }
    if train.ids is not None and test.ids is not None:
        columns["client"] = pa.array(np.concatenate([train.ids, test.ids]).tolist(), pa.string())
    meta = {"shape": list(pixels.shape[1:]), "classes": len(names), "names": names, "mean": mean, "std": std}
    return pa.table(columns), {"step": "data", "source": source, **meta}


def _numbered(train: Split, test: Split | None) -> tuple[Split, Split | None, list[str]]:
    """Both splits with labels 0 .. classes-1, and the names of the classes."""
    splits = [s for s in (train, test) if s is not None]
    if any(s.names != train.names for s in splits):
        raise FedpipeError("data.label: the training and test splits name their classes differently")
    if train.names is None:
        if any(s.labels.dtype.kind != train.labels.dtype.kind for s in splits):
            raise FedpipeError("data.label: the label column has different types in the training and test splits")
        values = np.unique(np.concatenate([s.labels for s in splits]))
        names = [str(v) for v in values]
        numbered = [Split(s.images, np.searchsorted(values, s.labels), names, s.ids) for s in splits]
    else:
        names, numbered = train.names, splits
    for s in numbered:
        if not len(s.labels) or s.labels.min() < 0 or s.labels.max() >= len(names):
            raise FedpipeError(
                f"data.label: wanted rows with labels 0 to {len(names) - 1}; no rows, or others, were found"
            )
    return numbered[0], numbered[1] if test is not None else None, names


def _split(train: Split, classes: int) -> tuple[Split, Split]:
    n = len(train.labels)
    if n < TEST_SHARE:
        raise FedpipeError(f"data: {n} rows are too few to set a fifth aside for testing")
    taken = draw_by_class(train.labels, classes, n // TEST_SHARE, rng(0, purpose="data/test"))
    return train.take(np.setdiff1d(np.arange(n), taken)), train.take(taken)


def _subset(train: Split, test: Split, classes: int, rows: int) -> tuple[Split, Split]:
    wanted = {"train": (train, rows), "test": (test, max(1, rows // TEST_SHARE))}
    out = []
    for split, (all_rows, count) in wanted.items():
        there: NDArray[Any] = all_rows.labels
        if count > len(there):
            raise FedpipeError(f"data.rows: {rows} asks for {count} {split} rows, there are {len(there)}")
        out.append(all_rows.take(draw_by_class(there, classes, count, rng(0, purpose=f"data/rows/{split}"))))
    return out[0], out[1]
