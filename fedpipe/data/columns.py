"""Which columns of a data set are the image, the label and the client: told by the study, or found by their types."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedpipe.config import Data
from fedpipe.data.sources import Split
from fedpipe.errors import FedpipeError


def extract(rows: datasets.Dataset, spec: Data) -> Split:
    """Images, labels and client ids of a split; raises `FedpipeError` listing the columns when one is not clear."""
    image = _choose(rows, "data.image", spec.image, [n for n, f in rows.features.items() if _is_image(f)])
    named = [n for n, f in rows.features.items() if isinstance(f, datasets.ClassLabel)]
    whole = [n for n, f in rows.features.items() if isinstance(f, datasets.Value) and "int" in f.dtype]
    label = _choose(rows, "data.label", spec.label, named or whole)
    if not _is_image(rows.features[image]):
        raise FedpipeError(f"data.image: column {image!r} holds no images ({_listed(rows)})")
    feature = rows.features[label]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return Split(list(_values(rows, image)), _labels(rows, label), names, _ids(rows, spec))


def _choose(rows: datasets.Dataset, key: str, wanted: str | None, found: list[str]) -> str:
    if wanted is not None:
        if wanted not in rows.features:
            raise FedpipeError(f"{key}: no column {wanted!r} ({_listed(rows)})")
        return wanted
    if len(found) != 1:
        problem = f"{', '.join(found)} could all be it" if found else "no column has the type for it"
        raise FedpipeError(f"{key}: {problem}; name one ({_listed(rows)})")
    return found[0]


def _listed(rows: datasets.Dataset) -> str:
    return f"columns: {', '.join(rows.features)}"


def _is_image(feature: Any) -> bool:
    """An Image column, or what one is without Hugging Face metadata: a struct of bytes and path, or binary."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or (isinstance(feature, datasets.Value) and "binary" in feature.dtype)


def _values(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    values = rows.data.column(column)
    if values.null_count:
        raise FedpipeError(f"column {column!r}: {values.null_count} of {len(values)} rows have no value")
    return values


def _labels(rows: datasets.Dataset, column: str) -> NDArray[Any]:
    """int64 for whole numbers and classes, text for anything else."""
    values = _values(rows, column)
    kind = values.type
    if pa.types.is_nested(kind) or pa.types.is_floating(kind) or pa.types.is_binary(kind):
        raise FedpipeError(f"data.label: column {column!r} holds no class labels but {kind} ({_listed(rows)})")
    return values.cast(pa.int64() if pa.types.is_integer(kind) else pa.string()).to_numpy()


def _ids(rows: datasets.Dataset, spec: Data) -> NDArray[np.str_] | None:
    column = spec.partition.column
    if spec.partition.kind != "natural" or column is None:
        return None
    if column not in rows.features:
        raise FedpipeError(f"data.partition.column: no column {column!r} ({_listed(rows)})")
    return np.asarray(_values(rows, column).cast(pa.string()).to_pylist(), dtype=np.str_)
