"""Masks as 32-bit words: pack, unpack, count, and cut a buffer at a threshold. Leading axes are rows (clients)."""

import torch
from torch import Tensor

from fedpipe.kernels.bits import reference
from fedpipe.kernels.common import Backend, chosen, wanted, words

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def pack(mask: Tensor, backend: Backend = "auto") -> Tensor:
    """int32 words [..., words(n)] of a bool mask [..., n]; bits past n are 0."""
    wanted("mask", mask, (torch.bool,))
    return _code(backend, mask).pack(mask)


def unpack(packed: Tensor, n: int, backend: Backend = "auto") -> Tensor:
    """bool mask [..., n] of words [..., words(n)]."""
    if n < 1:
        raise ValueError(f"n: {n}; wanted a number of entries, at least 1")
    wanted("packed", packed, (torch.int32,), (*packed.shape[:-1], words(n)))
    return _code(backend, packed).unpack(packed, n)


def popcount(packed: Tensor, backend: Backend = "auto") -> Tensor:
    """Set bits of each row of words, int64 [...]; added in a fixed order."""
    wanted("packed", packed, (torch.int32,))
    return _code(backend, packed).popcount(packed)


def threshold_zero_(x: Tensor, threshold: float | Tensor, backend: Backend = "auto") -> Tensor:
    """Zero the entries of x [..., n] below a threshold in magnitude, in place; returns the words of those that stay.

    threshold: a number, or one per row [...]. An entry that is NaN stays, to be seen. Raises ValueError, before
    anything is written, for a threshold that is negative or NaN, and for wrong types and shapes.
    """
    wanted("x", x, FLOATS)
    # A number is looked at here, as asking a device for it would wait for all that runs there.
    fine = bool((threshold >= 0).all()) if isinstance(threshold, Tensor) else threshold >= 0
    if not fine:
        raise ValueError("threshold: negative or NaN; wanted numbers >= 0")
    if isinstance(threshold, Tensor):
        t = threshold.to(x.device, x.dtype).expand(x.shape[:-1]).contiguous()
    else:
        t = torch.full(x.shape[:-1], threshold, dtype=x.dtype, device=x.device)
    return _code(backend, x).threshold_zero_(x, t)


def bytes_moved(op: str, n: int, itemsize: int = 4) -> float:
    """Bytes one call must read and write for n entries, a bit a mask entry."""
    moved = {"pack": n + n / 8, "unpack": n + n / 8, "popcount": n / 8, "threshold_zero_": 2 * itemsize * n + n / 8}
    return moved[op]


def _code(backend: Backend, tensor: Tensor):  # type: ignore[no-untyped-def]
    if not chosen(backend, tensor):
        return reference
    from fedpipe.kernels.bits import kernel

    return kernel
