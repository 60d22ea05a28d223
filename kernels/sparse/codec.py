"""Messages: named tensors into the parts that go into a safetensors file, and back to the bit.

A tensor goes under its plain name, or as parts `name#codec.part`. The codec says where its entries are and what they
are: `dense`, `bits` (part `mask`: int32 words) or `index` (part `indices`: int32, ascending), then nothing (part
`values`, in the tensor's own type), `-bfloat16` (part `values`: float32 rounded) or `-q1` to `-q8` (parts `levels`,
of so many bits, and `scale`). Part `shape` is int64.

Of what is allowed the fewest bytes are sent, counting the payload and 80 B of a file's header for each part. With a
mask of the caller's that is `index` where it marks fewer entries than it has words (density under 1/32), else `bits`.
Without one the entries that are not 0 once rounded are marked (-0.0 is not 0), and `dense` and the plain name are
allowed as well.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fedpipe.kernels import bits, sparse
from fedpipe.kernels.common import wanted
from fedpipe.kernels.common import words as words_of
from fedpipe.kernels.sparse import parts as part
from fedpipe.kernels.sparse.levels import Quantised, dequantise, pack_levels, quantise

HEADER = 80  # bytes that safetensors spends on naming a tensor, about


def pack_message(name: str, x: Tensor, words: Tensor | None = None, values: str = "float32") -> dict[str, Tensor]:
    """Parts that carry a tensor, by name.

    words: mask [words(n)] of its n entries in order; those outside are not sent, and come back as 0. values: how
    float32 entries are sent, "float32" as they are, "bfloat16" rounded, "q1" to "q8" as levels of so many bits
    (`levels.py`); integers go as they are. Raises ValueError for a name with a `#`, for wrong types and shapes, and
    where entries to be quantised are not finite.
    """
    if "#" in name or not name:
        raise ValueError(f"name: {name!r}; wanted one without #, which is for codecs")
    flat, form = x.detach().contiguous().flatten(), _form(name, x, values)
    wanted(name, flat, sparse.TYPES)
    own = words is None
    if words is not None:
        wanted(f"{name}: words", words, (torch.int32,), (words_of(flat.numel()),), like=flat)
    stored, scale = _stored(flat, words, form)
    if words is None or form == "q1":  # one bit has no level for 0
        words = bits.pack(sparse.raw(stored) != 0)
    nnz = sparse.count(f"{name}: words", words, flat.numel())
    layout = _smallest(form, x, stored.itemsize, nnz, own)
    if layout == "plain":
        return {name: _restored(stored, scale, form).reshape(x.shape)}
    head = f"{name}#{layout}-{form}" if form else f"{name}#{layout}"
    parts = {"shape": torch.tensor(x.shape, dtype=torch.int64, device=x.device)}
    if layout == "bits":
        parts["mask"], stored = words, sparse.encode(stored, words, nnz)
    elif layout == "index":
        parts["indices"], stored = sparse.encode_indices(stored, words, nnz)
    parts |= {"values": stored} if scale is None else {"levels": pack_levels(stored, int(form[1:])), "scale": scale}
    return {f"{head}.{k}": t for k, t in parts.items()}


def unpack_message(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor that `pack_message` was given, rounded as was asked; to the bit.

    Raises ValueError, naming the part and what was wanted, for parts missing or too many, and for types, shapes,
    counts, bits, indices, levels and scales that cannot be. Finite values are not asked for.
    """
    found = {k for k in parts if k == name or k.startswith(f"{name}#")}
    if found == {name}:
        return parts[name]
    head, layout, form = part.codec(name, found)
    here = {k.removeprefix(f"{head}."): parts[k] for k in found}
    shape = part.shape(f"{head}.shape", here["shape"])
    n = math.prod(shape)
    m = part.entries(head, layout, here, n)
    values = part.values(head, form, here, m)
    if layout == "bits":
        values = sparse.decode(values, here["mask"], n)
    elif layout == "index":
        values = sparse.decode_indices(here["indices"], values, n)
    return values.reshape(shape)


def pack_messages(
    tensors: Mapping[str, Tensor], words: Mapping[str, Tensor] | None = None, values: str = "float32"
) -> dict[str, Tensor]:
    """Parts of many tensors, each as in `pack_message`, with its mask where `words` has one.

    Names with another codec than those here, which a method has packed itself, are passed on as they are.
    """
    words = words or {}
    if unknown := sorted(words.keys() - tensors.keys()):
        raise ValueError(f"words: {unknown}; wanted names of tensors, {sorted(tensors)}")
    parts: dict[str, Tensor] = {}
    for name, x in tensors.items():
        parts |= {name: x} if _foreign(name) else pack_message(name, x, words.get(name), values)
    return parts


def unpack_messages(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a message, each as in `unpack_message`; parts of other codecs under their own names."""
    own: dict[str, dict[str, Tensor]] = {}
    for k, t in parts.items():
        own.setdefault(k if _foreign(k) else k.partition("#")[0], {})[k] = t
    return {name: mine[name] if _foreign(name) else unpack_message(mine, name) for name, mine in own.items()}


def _foreign(name: str) -> bool:
    return "#" in name and not part.HEAD.match(name)


def _form(name: str, x: Tensor, values: str) -> str:
    """How entries are changed before they are sent: "" not at all."""
    if not re.fullmatch(f"float32|{part.FORM}", values):
        raise ValueError(f"values: {values!r}; wanted float32, bfloat16 or q1 to q8")
    if values == "float32" or not x.is_floating_point():
        return ""
    if x.dtype != torch.float32:
        raise ValueError(f"{name}: {x.dtype}; wanted float32 to send it as {values}")
    return values


def _stored(flat: Tensor, words: Tensor | None, form: str) -> tuple[Tensor, Tensor | None]:
    """Every entry as it is sent, and the scale of levels; entries outside a mask have no part in the scale."""
    if not form.startswith("q"):
        return (flat.bfloat16() if form else flat), None
    if words is not None and flat.numel():
        flat = torch.where(bits.unpack(words, flat.numel()), flat, 0.0)
    return quantise(flat, int(form[1:]))


def _restored(stored: Tensor, scale: Tensor | None, form: str) -> Tensor:
    if scale is not None:
        return dequantise(Quantised(stored, scale), int(form[1:]))
    return stored.float() if form else stored


def _smallest(form: str, x: Tensor, itemsize: int, nnz: int, own: bool) -> str:
    """The layout with the fewest bytes; the first of equals. own: the mask is of the tensor's own entries."""
    n, quantised = x.numel(), form.startswith("q")
    payload = lambda m: 4 * words_of(m * int(form[1:])) + 4 if quantised else itemsize * m  # noqa: E731
    sizes = {"bits": 4 * words_of(n) + payload(nnz)}
    if n < sparse.INDEXABLE:
        sizes["index"] = 4 * nnz + payload(nnz)
    if own and form and (form != "q1" or nnz == n):
        sizes["dense"] = payload(n)
    for layout in sizes:
        sizes[layout] += 8 * x.ndim + HEADER * (2 + quantised + len(part.WHERE[layout]))
    if own:
        sizes = {"plain": x.itemsize * n + HEADER, **sizes}
    return min(sizes, key=lambda layout: sizes[layout])
