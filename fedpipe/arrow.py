"""Rows as Arrow tables, and their columns as arrays, by buffers.

pyarrow's own conversions look whether they are given something of pandas, for which they import it: 35 MiB and 0.4
CPU-s of a process that has no use for it.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import index
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of rows, as `pa.Table.from_pylist` makes it: null where a row lacks a column."""
    return pa.Table.from_arrays([array([r.get(f.name) for r in rows], f.type) for f in schema], schema=schema)


def array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values of integers, float64, bool, string, or lists and structs of these; None is null."""
    there = [v is not None for v in values]
    valid = None if all(there) else pa.py_buffer(np.packbits(there, bitorder="little"))
    if pa.types.is_struct(kind):
        parts = [array([v and v[field.name] for v in values], field.type) for field in kind]
        return pa.Array.from_buffers(kind, len(values), [valid], children=parts)
    if pa.types.is_list(kind):
        parts = [array([x for v in values for x in v or ()], kind.value_type)]
        return pa.Array.from_buffers(kind, len(values), [valid, _ends(values)], children=parts)
    if pa.types.is_string(kind):
        text = [(v or "").encode() for v in values]
        return pa.Array.from_buffers(kind, len(values), [valid, _ends(text), pa.py_buffer(b"".join(text))])
    if pa.types.is_boolean(kind):
        held = np.packbits(np.array([bool(v) for v in values], bool), bitorder="little")
    else:  # NumPy would cut a fraction off
        plain = [0 if v is None else index(v) if pa.types.is_integer(kind) else v for v in values]
        held = np.array(plain, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(held)])


def _ends(values: Sequence[Any]) -> pa.Buffer:
    """Where each of the values ends in all of them side by side, after a 0."""
    return pa.py_buffer(np.array([0, *accumulate(len(v or ()) for v in values)], np.int32))


def numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of numbers or bools without nulls, copied."""
    parts = [_numbers(chunk) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.empty(0, column.type.to_pandas_dtype())


def _numbers(chunk: pa.Array) -> NDArray[Any]:
    held, kind = chunk.buffers()[1] or b"", chunk.type
    here = slice(chunk.offset, chunk.offset + len(chunk))
    if pa.types.is_boolean(kind):
        return np.unpackbits(np.frombuffer(held, np.uint8), bitorder="little")[here].astype(bool)
    return np.frombuffer(held, kind.to_pandas_dtype())[here]
