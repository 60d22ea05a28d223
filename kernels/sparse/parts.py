"""The parts of a message by name, and what is asked of each before it is believed."""

import re

import torch
from torch import Tensor

from fedpipe.kernels import sparse
from fedpipe.kernels.common import wanted
from fedpipe.kernels.common import words as words_of
from fedpipe.kernels.sparse.levels import Quantised, dequantise, unpack_levels

FORM = "bfloat16|q[1-8]"
HEAD = re.compile(rf"[^#]+#(dense|bits|index)\b(?:-({FORM}))?")
WHERE: dict[str, tuple[str, ...]] = {"dense": (), "bits": ("mask",), "index": ("indices",)}


def codec(name: str, found: set[str]) -> tuple[str, str, str]:
    """What stands before the parts' names, where entries are and what they are; all parts are there, and no other."""
    heads = {k.rpartition(".")[0] for k in found}
    head = min(heads, default="")
    match = HEAD.fullmatch(head)
    if len(heads) != 1 or match is None:
        raise ValueError(f"{name}: came as {sorted(found)}; wanted the tensor itself or the parts of one codec")
    form = match[2] or ""
    parts = {"shape", *WHERE[match[1]], *(("levels", "scale") if form.startswith("q") else ("values",))}
    if found != {f"{head}.{part}" for part in parts}:
        raise ValueError(f"{head}: parts {sorted(k.rpartition('.')[2] for k in found)}; wanted {sorted(parts)}")
    return head, match[1], form


def shape(name: str, t: Tensor) -> tuple[int, ...]:
    wanted(name, t, (torch.int64,), (t.numel(),))
    shape = tuple(t.tolist())
    if any(size < 0 for size in shape):
        raise ValueError(f"{name}: {shape}; wanted sizes of at least 0")
    return shape


def entries(head: str, layout: str, here: dict[str, Tensor], n: int) -> int:
    """How many entries are sent, the mask or the indices checked."""
    if layout == "bits":
        wanted(f"{head}.mask", here["mask"], (torch.int32,), (words_of(n),), like=here["shape"])
        return sparse.count(f"{head}.mask", here["mask"], n)
    if layout == "index":
        if n >= sparse.INDEXABLE:
            raise ValueError(f"{head}.shape: {n} entries; wanted fewer than 2**31, which int32 indices reach")
        indices = here["indices"]
        wanted(f"{head}.indices", indices, (torch.int32,), (indices.numel(),), like=here["shape"])
        sparse.check_range(f"{head}.indices", indices, n)
        if not bool((indices[1:] > indices[:-1]).all()):
            raise ValueError(f"{head}.indices: not ascending, or one twice; wanted each entry once, in order")
        return indices.numel()
    return n


def values(head: str, form: str, here: dict[str, Tensor], m: int) -> Tensor:
    """The entries sent [m], as they were rounded."""
    if not form.startswith("q"):
        types = (torch.bfloat16,) if form else sparse.TYPES
        wanted(f"{head}.values", here["values"], types, (m,), like=here["shape"])
        return here["values"].float() if form else here["values"]
    wanted(f"{head}.scale", here["scale"], (torch.float32,), (), like=here["shape"])
    if not bool(here["scale"] >= 0):
        raise ValueError(f"{head}.scale: {float(here['scale'])}; wanted at least 0")
    levels = unpack_levels(f"{head}.levels", here["levels"], int(form[1:]), m)
    return dequantise(Quantised(levels, here["scale"]), int(form[1:]))
