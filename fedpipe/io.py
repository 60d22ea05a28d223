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
import mmap
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedpipe.errors import Damaged, FedpipeError

if TYPE_CHECKING:
    from fedpipe.types import Tensors

FORMAT = 1
BLANK = "seal:" + "0" * 32
_SEAL = re.compile(rb"seal:([0-9a-f]{32})")
Meta = dict[str, Any]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


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


def _seal(raw: bytes) -> bytes:
    at = raw.index(BLANK.encode())
    value = f"seal:{_checksum(raw)}".encode()
    return raw[:at] + value + raw[at + len(value) :]


def verify(raw: bytes | mmap.mmap, name: str) -> None:
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
        verify(path.read_bytes(), str(path))
    except Damaged:
        return False
    return True


def checksum(path: Path) -> str:
    """Of a file that carries no seal of its own, a picture say."""
    return _checksum(path.read_bytes())


def _meta(meta: Mapping[str, Any], content: str) -> str:
    return canonical({**meta, "format": FORMAT, "content": content, "seal": BLANK})


def _checked(meta: Meta, name: str) -> Meta:
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
        plain = t.view(torch.int16) if t.dtype == torch.bfloat16 else t  # a type numpy does not have
        h.update(plain.numpy().tobytes())
    return h.hexdigest()


def encode(tensors: "Tensors", meta: Mapping[str, Any]) -> bytes:
    """A complete, sealed safetensors image: what a message is, and whose length is the bytes counted."""
    from safetensors.torch import save

    plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    return _seal(save(plain, metadata={"fedpipe": _meta(meta, content_of(plain))}))


def header_bytes(image: bytes) -> int:
    """Bytes of a safetensors image that are not payload."""
    return 8 + int.from_bytes(image[:8], "little")


def decode(image: bytes, name: str = "message") -> "tuple[Tensors, Meta]":
    """Inverse of `encode`, checked."""
    from safetensors.torch import load

    meta = image_meta(image, name)
    return dict(sorted(load(image).items())), meta  # the library's order differs from call to call


def image_meta(image: bytes, name: str = "message") -> Meta:
    """The metadata of a tensor image, the whole of it checked."""
    verify(image, name)
    try:
        header = json.loads(image[8 : header_bytes(image)])
        meta = json.loads(header["__metadata__"]["fedpipe"])
    except (ValueError, LookupError, TypeError) as e:
        raise FedpipeError(f"{name}: not readable as safetensors with fedpipe's metadata; run its step again") from e
    return _checked(meta, name)


def write_tensors(path: Path, tensors: "Tensors", meta: Mapping[str, Any]) -> None:
    write_bytes(path, encode(tensors, meta))


def read_tensors(path: Path) -> "tuple[Tensors, Meta]":
    return decode(_read(path), str(path))


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
        table = pa.Table.from_pylist(table, schema=schema)
    table = table.combine_chunks().replace_schema_metadata({"fedpipe": _meta(meta, _table_content(table))})
    sink = io.BytesIO()
    if path.suffix == ".arrow":
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        # Without the stored Arrow schema the writer drops the schema's metadata: it is added by hand.
        with pq.ParquetWriter(sink, table.schema, compression="zstd", store_schema=False) as out:
            out.write_table(table)
            out.add_key_value_metadata({"fedpipe": table.schema.metadata[b"fedpipe"].decode()})
    write_bytes(path, _seal(sink.getvalue()))


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
    _exists(path)
    if not path.stat().st_size:
        raise Damaged(f"{path}: damaged or cut short, it is empty; delete it and run again")
    with open(path, "rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    verify(mapped, str(path))
    return _table(pa.py_buffer(mapped), path)


def table_meta(table: pa.Table, name: str = "table") -> Meta:
    found = (table.schema.metadata or {}).get(b"fedpipe")
    if found is None:
        raise FedpipeError(f"{name}: no table of fedpipe, it lacks the metadata; run its step again")
    return _checked(json.loads(found), name)


def read_meta(path: Path) -> Meta:
    """The metadata of any artefact, checked with its whole file."""
    return (
        image_meta(_read(path), str(path)) if path.suffix == ".safetensors" else table_meta(read_table(path), str(path))
    )


# ------------------------------------------------------------------------------------------------ bytes
def _exists(path: Path) -> None:
    if not path.is_file():
        raise FedpipeError(f"{path}: no such file; the step that writes it has not run")


def _read(path: Path) -> bytes:
    _exists(path)
    return path.read_bytes()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def write_bytes(path: Path, raw: bytes, durable: bool = True) -> None:
    """Write a file whole or not at all; a whole file of equal bytes is left as it is, a link is not."""
    if path.is_file() and not path.is_symlink() and path.stat().st_size == len(raw) and path.read_bytes() == raw:
        return
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(raw)
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
    write_bytes(path, _seal(text.encode()))


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
