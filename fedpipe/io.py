"""The one writer and reader of artefacts.

Tensors are safetensors, tables are Parquet (`.parquet`) or Arrow IPC (`.arrow`). Every file carries one metadata
key, `fedpipe`, holding canonical JSON, and in it a *seal*: the checksum of the whole file with the seal itself
blanked, so that any altered or missing byte is found by reading that file alone. The *content digest* (names, types,
shapes, values) stands beside it and travels as provenance; it does not depend on the container.
"""

import contextlib
import hashlib
import io
import json
import math
import mmap
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedpipe import arrow
from fedpipe.errors import Damaged, FedpipeError

if TYPE_CHECKING:
    from fedpipe.types import Tensors

FORMAT = 1
BLANK = "seal:" + "0" * 32
PACKED = ".pack"  # files of many messages: fedpipe.packed
_SEAL = re.compile(rb"seal:([0-9a-f]{32})")
# What safetensors calls the types of tensors, as torch calls them.
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "C64": "complex64",
          "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
          **{f"{k}{n}": f"{t}{n}" for k, t in (("I", "int"), ("U", "uint")) for n in (8, 16, 32, 64)}}  # fmt: skip
Meta = dict[str, Any]
Buffer = bytes | bytearray | memoryview | mmap.mmap


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return _CANONICAL.encode(value)


def digest(*parts: str | bytes) -> str:
    """Short content name (64 bits, hex) of text or bytes."""
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        h.update(len(raw).to_bytes(8, "little"))
        h.update(raw)
    return h.hexdigest()


def _checksum(raw: bytes | memoryview) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def seal(raw: bytes) -> bytes:
    """The same bytes with their checksum in the place of `BLANK`."""
    at, view = raw.index(BLANK.encode()), memoryview(raw)
    value = f"seal:{_checksum(raw)}".encode()
    return b"".join((view[:at], value, view[at + len(value) :]))


def seal_of(raw: Buffer) -> str:
    """The seal that sealed bytes carry, unchecked."""
    found = _SEAL.search(raw)
    return found[0].decode() if found else ""


def verify(raw: Buffer, name: str) -> None:
    """Raise `Damaged`, naming the file, unless `raw` is exactly what was written."""
    view = memoryview(raw)
    for m in _SEAL.finditer(raw):
        if m.group() == BLANK.encode():  # Arrow repeats its metadata in the footer, where the seal stays blank
            continue
        checksum = hashlib.blake2b(view[: m.start()], digest_size=16)
        checksum.update(BLANK.encode())
        checksum.update(view[m.end() :])
        if checksum.hexdigest() == m.group(1).decode():
            return
    raise Damaged(f"{name}: damaged, cut short or not written by fedpipe (no checksum fits); delete it and run again")


def whole(path: Path) -> bool:
    """Whether a sealed file is exactly what was written."""
    try:
        if path.suffix == PACKED:
            from fedpipe.packed import Packed

            Packed(path).verify()
        else:
            verify(mapped(path), str(path))
    except Damaged:
        return False
    return True


def checksum(path: Path) -> str:
    """Of a file that carries no seal of its own, a picture say."""
    return _checksum(path.read_bytes())


def metadata(meta: Mapping[str, Any], content: str) -> str:
    """Text of an artefact's `fedpipe` key, the seal in it still blank."""
    return canonical({**meta, "format": FORMAT, "content": content, "seal": BLANK})


def checked(meta: Meta, name: str) -> Meta:
    """Metadata without its seal; FedpipeError, naming the file, where it is of another format."""
    if meta.get("format") != FORMAT:
        raise FedpipeError(
            f"{name}: artefact format {meta.get('format')}, this version reads {FORMAT}; run its step again"
        )
    return {k: v for k, v in meta.items() if k != "seal"}


# ---------------------------------------------------------------------------------------------- tensors
def content_of(tensors: "Tensors") -> str:
    """Content digest of named tensors: names, dtypes, shapes, bytes."""
    import torch

    h = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        flat = t.as_strided((t.numel(),), (1,))  # the stride of a single entry may be any
        h.update(flat.view(torch.uint8).numpy().data)
    return h.hexdigest()


def encode(tensors: "Tensors", meta: Mapping[str, Any]) -> bytes:
    """A complete, sealed safetensors image: what a message is, and whose length is the bytes counted."""
    from safetensors.torch import save

    plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    end = 0
    for n in sorted(plain, key=lambda n: plain[n].data_ptr()):  # the library takes no two that share memory
        if plain[n].data_ptr() < end:
            plain[n] = plain[n].clone()
        else:
            end = plain[n].data_ptr() + plain[n].nbytes
    return seal(save(plain, metadata={"fedpipe": metadata(meta, content_of(plain))}))


def header_bytes(image: Buffer) -> int:
    """Bytes of a safetensors image that are not payload."""
    return 8 + int.from_bytes(image[:8], "little")


def decode(image: Buffer, name: str = "message") -> "tuple[Tensors, Meta]":
    """Inverse of `encode`, checked. The tensors are views of the image, or of a copy where it cannot be written to."""
    import torch

    header, meta = _header(image, name)
    at, raw = header_bytes(image), bytearray(image) if memoryview(image).readonly else image
    tensors: Tensors = {}
    for n in sorted(header):
        kind, shape = header[n]["dtype"], header[n]["shape"]
        if kind not in _TYPES:
            raise FedpipeError(f"{name}: {n} is of type {kind}; known are {', '.join(_TYPES)}")
        dtype = getattr(torch, _TYPES[kind])
        first, count = at + header[n]["data_offsets"][0], math.prod(shape)
        flat = torch.frombuffer(raw, dtype=dtype, count=count, offset=first) if count else torch.empty(0, dtype=dtype)
        tensors[n] = flat.view(shape)
    return tensors, meta


def image_meta(image: Buffer, name: str = "message") -> Meta:
    """The metadata of a tensor image, the whole of it checked."""
    return _header(image, name)[1]


def _header(image: Buffer, name: str) -> tuple[dict[str, Any], Meta]:
    """What a tensor image says of its tensors, and its metadata; the whole of it checked."""
    verify(image, name)
    try:
        header = json.loads(bytes(image[8 : header_bytes(image)]))
        meta = json.loads(header.pop("__metadata__")["fedpipe"])
    except (ValueError, LookupError, TypeError) as e:
        raise FedpipeError(f"{name}: not readable as safetensors with fedpipe's metadata; run its step again") from e
    return header, checked(meta, name)


def write_tensors(path: Path, tensors: "Tensors", meta: Mapping[str, Any]) -> None:
    write_bytes(path, encode(tensors, meta))


def read_tensors(path: Path) -> "tuple[Tensors, Meta]":
    """Checked tensors, views of a private map of the file: what is written to them stays in this process."""
    return decode(mapped(path), str(path))


# ----------------------------------------------------------------------------------------------- tables
def _table_content(table: pa.Table) -> str:
    plain = table.replace_schema_metadata(None).combine_chunks()
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, plain.schema) as writer:
        writer.write_table(plain)
    return digest(sink.getvalue())


def write_table(
    path: Path, table: pa.Table | list[dict[str, Any]], meta: Mapping[str, Any], schema: pa.Schema | None = None
) -> None:
    """Write a table, whole or not at all; a list of rows needs `schema` when it may be empty."""
    if not isinstance(table, pa.Table):
        table = arrow.table(table, schema) if schema else pa.Table.from_pylist(table)
    table = table.combine_chunks().replace_schema_metadata({"fedpipe": metadata(meta, _table_content(table))})
    sink = io.BytesIO()
    if path.suffix == ".arrow":
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        # Without the stored Arrow schema the writer drops the schema's metadata: it is added by hand.
        with pq.ParquetWriter(sink, table.schema, compression="zstd", store_schema=False) as out:
            out.write_table(table)
            out.add_key_value_metadata({"fedpipe": table.schema.metadata[b"fedpipe"].decode()})
    write_bytes(path, seal(sink.getvalue()))


def read_table(path: Path) -> pa.Table:
    """A checked table; its `fedpipe` metadata is read with `table_meta`."""
    raw = _read(path)
    verify(raw, str(path))
    return _table(pa.py_buffer(raw), path)


def _table(raw: pa.Buffer, path: Path) -> pa.Table:
    source, kind = pa.BufferReader(raw), "Arrow" if path.suffix == ".arrow" else "Parquet"
    try:
        table = (
            pa.ipc.open_file(source).read_all() if kind == "Arrow" else pq.ParquetFile(source).read(use_threads=False)
        )
    except pa.ArrowException as e:
        raise FedpipeError(f"{path}: not readable as {kind}; run its step again") from e
    table_meta(table, str(path))
    return table


def map_arrow(path: Path) -> pa.Table:
    """A checked Arrow file as a memory map: its columns are views of the file, not copies.

    The map is private: a write through such a view changes this process's copy of a page, never the file.
    """
    raw = mapped(path)
    verify(raw, str(path))
    return _table(pa.py_buffer(raw), path)


def table_meta(table: pa.Table, name: str = "table") -> Meta:
    found = (table.schema.metadata or {}).get(b"fedpipe")
    if found is None:
        raise FedpipeError(f"{name}: no table of fedpipe, it lacks the metadata; run its step again")
    return checked(json.loads(found), name)


def read_meta(path: Path) -> Meta:
    """The metadata of any artefact, checked with its whole file."""
    if path.suffix == ".safetensors":
        return image_meta(mapped(path), str(path))
    if path.suffix == PACKED:
        from fedpipe.packed import Packed

        return Packed(path).verify()
    return table_meta(read_table(path), str(path))


# ------------------------------------------------------------------------------------------------ bytes
def _exists(path: Path) -> None:
    if not path.is_file():
        raise FedpipeError(f"{path}: no such file; the step that writes it has not run")


def _read(path: Path) -> bytes:
    _exists(path)
    return path.read_bytes()


def mapped(path: Path) -> mmap.mmap:
    """A file as a private map: a write to it changes this process's copy of a page, never the file."""
    _exists(path)
    if not path.stat().st_size:
        raise Damaged(f"{path}: damaged or cut short, it is empty; delete it and run again")
    with open(path, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def write_bytes(path: Path, raw: bytes, durable: bool = True) -> None:
    """Write a file whole or not at all; a whole file of equal bytes is left as it is, a link is not."""
    if path.is_file() and not path.is_symlink() and path.stat().st_size == len(raw) and path.read_bytes() == raw:
        return
    write_parts(path, (raw,), durable)


def write_parts(path: Path, parts: Iterable[bytes], durable: bool = True) -> None:
    """Write a file of parts, one after another as they come, whole or not at all."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.writelines(parts)
            f.flush()
            if durable:
                os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise FedpipeError(f"{path}: could not be written ({e.strerror or e})") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_sealed(path: Path, text: str) -> None:
    """Text that holds `BLANK` once: its seal takes that place."""
    write_bytes(path, seal(text.encode()))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears whole, or not at all, when the block ends without an error."""
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _replace_folder(temporary, path)
    except OSError as e:
        raise FedpipeError(f"{path}: could not be written ({e.strerror or e})") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(new: Path, path: Path) -> None:
    """The old folder steps aside whole: deleted in place, a kill would leave half of it, which reads as a whole one."""
    old = _temporary(path)
    if path.is_dir():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.is_dir():
            os.replace(old, path)
        raise
    with contextlib.suppress(OSError):
        _remove(old)


def remove(path: Path) -> None:
    """Remove an artefact, a file or a folder of files. Where it, or a file in it, is a link into the cache that
    workflows share, its whole entry there goes as well (all that one hash names): it would be fetched again."""
    for link in [path, *(path.iterdir() if path.is_dir() else ())]:
        real = link.resolve() if link.is_symlink() else Path()
        for part in (real, *real.parents):
            if entry := re.match(r"[0-9a-f]{64}(?=[_.])", part.name):
                for made in list(part.parent.glob(f"{entry[0]}*")):
                    _remove(made)
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Hard-link a finished artefact, or copy it where links fail."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
