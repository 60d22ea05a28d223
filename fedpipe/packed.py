"""Many messages in one file: sealed images one after another, then a table of who sent which, then its length.

    image, image, ..., table (JSON, sealed), length of the table (8 bytes, little-endian)

Every image carries its own seal and the table's covers the rest, so each byte is checked once, by whoever reads it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedpipe import io
from fedpipe.errors import Damaged, FedpipeError

_END = 8  # bytes of the table's length


def write(path: Path, images: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, sealed image) pairs as they come, one in memory at a time; whole or not at all."""
    io.write_parts(path, _parts(images))


def _parts(images: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    at, entries, contents = 0, list[tuple[str, int, int]](), list[str]()
    for name, image in images:
        entries.append((name, at, len(image)))
        contents += (name, io.seal_of(image))
        at += len(image)
        yield image
    table = io.metadata({"messages": entries}, io.digest(*contents)).encode()
    yield io.seal(table + len(table).to_bytes(_END, "little"))


class Packed:
    """A packed file, memory-mapped, its table checked; an image is checked when it is read."""

    def __init__(self, path: Path):
        self.path, raw = path, memoryview(io.mapped(path))
        begin = len(raw) - _END - int.from_bytes(raw[-_END:], "little")
        if len(raw) < _END or begin < 0:
            raise Damaged(f"{path}: damaged, cut short or not written by fedpipe; delete it and run again")
        io.verify(raw[begin:], str(path))
        try:
            self.meta = io.checked(json.loads(bytes(raw[begin:-_END])), str(path))
            self.images = {name: raw[at : at + size] for name, at, size in self.meta["messages"]}
        except (ValueError, LookupError, TypeError) as e:
            raise FedpipeError(f"{path}: not readable as packed messages; run its step again") from e
        if sum(map(len, self.images.values())) != begin:
            raise Damaged(f"{path}: damaged, bytes of no message lie in it; delete it and run again")

    def image(self, name: str) -> memoryview:
        """The bytes of a message, not checked yet."""
        if name not in self.images:
            raise FedpipeError(f"{self.path}: no message of client {name} in it; run its step again")
        return self.images[name]

    def said(self, name: str) -> str:
        """How a message is named to people."""
        return f"{self.path} (client {name})"

    def verify(self) -> io.Meta:
        """The file's metadata, every byte of it checked."""
        for name, image in self.images.items():
            io.verify(image, self.said(name))
        return self.meta
