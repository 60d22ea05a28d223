"""What clients send: tensors at hand or the sealed image of a file, and how many bytes that is, counted without it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from fedpipe import io
from fedpipe.types import Tensors

Layout = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]  # (name, type, shape) of tensors, in their order


def layout(tensors: Tensors) -> Layout:
    return tuple((n, t.dtype, t.shape) for n, t in tensors.items())


def sizes(names: Layout, meta: Mapping[str, Any]) -> tuple[int, int]:
    """(payload, header) bytes of `io.encode` of tensors like these: the exact ones, though nothing is encoded."""
    payload, bare = _bare(names)
    header = bare + _keys(tuple(meta)) + sum(map(_value, meta.values()))
    return payload, 8 + -(-header // 8) * 8


@lru_cache(maxsize=1024)
def _keys(keys: tuple[str, ...]) -> int:
    """Bytes in a header of the metadata's text, but for the values of these keys."""
    return _within(io.metadata(dict.fromkeys(keys, 0), "0" * 16)) - len(keys)  # content digests are of one length


def _value(value: Any) -> int:
    """Bytes in a header of a value of the metadata."""
    if type(value) is int or (type(value) is float and isfinite(value)):
        return len(repr(value))  # as JSON has it
    return _within(io.canonical(value))


def _within(text: str) -> int:
    """Bytes of canonical text, which is ASCII, as a string of a header: quotes and backslashes are escaped."""
    return len(text) + text.count('"') + text.count("\\")


@lru_cache(maxsize=1024)
def _bare(names: Layout) -> tuple[int, int]:
    """Bytes of the payload, and of the header without its metadata's text, its length in front and its padding.

    From an image the library makes, once for each layout: how it writes a header is its own affair.
    """
    from safetensors.torch import save

    image = save({n: torch.empty(shape, dtype=dtype) for n, dtype, shape in names}, metadata={"fedpipe": ""})
    header = io.header_bytes(image)
    return len(image) - header, len(image[8:header].rstrip(b" "))


class Message(Protocol):
    """What one client sent."""

    def open(self) -> tuple[Tensors, io.Meta]:
        """Its tensors, sorted by name, and its metadata. Raises `Damaged`, naming the file and the client."""

    @property
    def image(self) -> bytes:
        """The sealed safetensors image that it is as a file."""


@dataclass
class Held:
    """A message of this process, its tensors as training left them."""

    tensors: Tensors
    meta: io.Meta

    def open(self) -> tuple[Tensors, io.Meta]:
        return self.tensors, self.meta

    @property
    def image(self) -> bytes:
        return io.encode(self.tensors, self.meta)


@dataclass
class Filed:
    """A message of a file, mapped into memory; said: how it is named to people."""

    raw: memoryview
    said: str

    def open(self) -> tuple[Tensors, io.Meta]:
        return io.decode(self.raw, self.said)

    @property
    def image(self) -> bytes:
        return bytes(self.raw)


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether all entries are finite. False may also mean that a sum overflowed: then look closer.

    A finite sum says so in a pass ten times as fast as a look at each entry.
    """
    return all(map(isfinite, numbers([t.sum() for t in tensors if t.is_floating_point()])))


def numbers(scalars: list[Tensor]) -> list[float]:
    """The values of tensors [], waited for once where they are on another device."""
    far = next((t.device for t in scalars if t.device.type != "cpu"), None)
    return [t.item() for t in scalars] if far is None else torch.stack([t.to(far) for t in scalars]).tolist()


def finite(tensor: Tensor) -> bool:
    """Whether all entries are finite."""
    return all_finite([tensor]) or bool(tensor.isfinite().all())
