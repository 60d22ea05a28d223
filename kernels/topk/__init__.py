"""Exact Top-K by magnitude, of a buffer or of each segment (layer) of it, as a mask of words.

Ties at the threshold are kept lowest index first, so that exactly k bits are set; two runs give the same bits, on any
device. No sort: a sample brackets the threshold, one read of the buffer decides all but the few entries inside the
bracket, and counts prove the bracket right or give a nearer one for another read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpipe.kernels.common import Backend, chosen, wanted
from fedpipe.kernels.topk import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Kept:
    """words: int32 [..., words(n)] with k bits set per row or segment; threshold: magnitudes [...] or [..., segments]
    in x's type, the k-th largest (infinity where k is 0). Leading axis: clients, where x has one."""

    words: Tensor
    threshold: Tensor


def topk_mask(x: Tensor, k: int | Sequence[int], sizes: Sequence[int] | None = None, backend: Backend = "auto") -> Kept:
    """Mask of the k largest |x| of each row of x [n] or [clients, n]; float32, bfloat16, float16 (or float64, by the
    reference only).

    sizes: lengths of the segments a row is made of, adding up to n; k then has one number for each of them. Reads the
    device once for the whole call, to verify its counts. Raises ValueError for a NaN in x, for k out of 0..n (or of
    0..size), and for wrong types and shapes.
    """
    return _called("topk_mask", x, k, sizes, backend)


def topk_zero_(
    x: Tensor, k: int | Sequence[int], sizes: Sequence[int] | None = None, backend: Backend = "auto"
) -> Kept:
    """Like `topk_mask`, and entries of x that are not kept become 0 in place; x stays as it was if it is refused."""
    return _called("topk_zero_", x, k, sizes, backend)


def bytes_moved(op: str, n: int, itemsize: int = 4) -> float:
    """Bytes one call must read and write for n entries: one read, two masks written, and as much again to settle."""
    mask = itemsize * n + n / 4 + n / 4
    return {"topk_mask": mask, "topk_zero_": mask + 2 * itemsize * n + n / 8}[op]


def _called(op: str, x: Tensor, k: int | Sequence[int], sizes: Sequence[int] | None, backend: Backend) -> Kept:
    wanted("x", x, FLOATS)
    if x.dim() not in (1, 2) or not x.shape[-1]:
        raise ValueError(f"x: shape {tuple(x.shape)}; wanted [n] or [clients, n], n at least 1")
    triton = chosen(backend, x)
    if backend == "triton":
        wanted("x", x, FLOATS[:3])
    lengths, counts = _segments(x.shape[-1], k, sizes)
    code = _kernel() if triton and x.dtype in FLOATS[:3] and x.numel() else reference
    packed, threshold = getattr(code, op)(x.view(-1, x.shape[-1]), counts, lengths)
    threshold = threshold[:, 0] if sizes is None else threshold
    return Kept(packed, threshold) if x.dim() == 2 else Kept(packed[0], threshold[0])


def _segments(n: int, k: int | Sequence[int], sizes: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths and numbers to keep, checked."""
    if isinstance(k, int) != (sizes is None):
        raise ValueError(f"k: {type(k).__name__}; wanted one integer, or with sizes one for each segment")
    lengths = (n,) if sizes is None else tuple(int(size) for size in sizes)
    counts = (k,) if isinstance(k, int) else tuple(int(count) for count in k)
    if min(lengths, default=0) < 1 or sum(lengths) != n:
        raise ValueError(f"sizes: {len(lengths)} that add up to {sum(lengths)}; wanted sizes >= 1 that add up to {n}")
    if len(counts) != len(lengths):
        raise ValueError(f"k: {len(counts)} numbers; wanted {len(lengths)}, one for each segment")
    for size, count in zip(lengths, counts, strict=True):
        if not 0 <= count <= size:
            raise ValueError(f"k: {count}; wanted 0 to {size}, the entries there are")
    return lengths, counts


def _kernel():  # type: ignore[no-untyped-def]
    from fedpipe.kernels.topk import kernel

    return kernel
