"""Frozen records, changed often."""

from typing import Any, TypeVar

T = TypeVar("T")


def changed(record: T, **fields: Any) -> T:
    """`dataclasses.replace` for a record that checks nothing when it is made, at a fifth of the time."""
    new = object.__new__(type(record))
    new.__dict__.update(record.__dict__, **fields)
    return new
