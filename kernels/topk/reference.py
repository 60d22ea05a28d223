"""Exact Top-K by magnitude in plain torch; on a CPU by numpy's partition, which torch's topk does not match.

Magnitudes are compared as integers: the bits of a float without its sign keep the order of |x|, to the last denormal.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedpipe.kernels.bits.reference import pack, raw

KEYS = {  # the integers of a type, the bits of a magnitude, and those of infinity: what lies above is a NaN
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
}
NAN = "x: holds a NaN; wanted numbers, whose magnitudes have an order"


def keys(x: Tensor) -> Tensor:
    """Integers in the order of |x|. Raises ValueError for a NaN."""
    integer, mask, infinity = KEYS[x.dtype]
    key = x.view(integer) & mask
    if key.numel() and int(key.max()) > infinity:
        raise ValueError(NAN)
    return key


def by_partition(key: np.ndarray, k: int, keep: np.ndarray) -> int:
    """Set the bits of the k largest of a row, lowest index first; returns the k-th largest."""
    t = np.partition(key, key.size - k)[key.size - k]
    np.greater_equal(key, t, out=keep)
    spare = int(np.count_nonzero(keep)) - k
    if spare:
        keep[np.flatnonzero(key == t)[-spare:]] = False
    return int(t)


def by_topk(key: Tensor, k: int, keep: Tensor) -> Tensor:
    """The same of rows [clients, n] where they are; returns the k-th largest of each row."""
    t = key.topk(k, sorted=False).values.amin(-1)
    above, tied = key > t[:, None], key == t[:, None]
    wanted = k - above.sum(-1)
    keep.copy_(above | (tied & (tied.cumsum(-1) <= wanted[:, None])))
    return t


def select(x: Tensor, k: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mask [clients, n] and k-th largest magnitude [clients, segments] of x [clients, n]."""
    key = keys(x)
    keep = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    t = torch.full((len(x), len(sizes)), KEYS[x.dtype][2], dtype=key.dtype, device=x.device)
    first = 0
    for s, (size, count) in enumerate(zip(sizes, k, strict=True)):
        part = slice(first, first + size)
        first += size
        if count and x.device.type == "cpu":
            rows = zip(key[:, part].numpy(), keep[:, part].numpy(), strict=True)
            t[:, s] = torch.tensor([by_partition(row, count, out) for row, out in rows])
        elif count:
            t[:, s] = by_topk(key[:, part], count, keep[:, part])
    return keep, t.view(x.dtype)


def topk_mask(x: Tensor, k: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Words [clients, words(n)] and thresholds [clients, segments] of x [clients, n]."""
    keep, threshold = select(x, k, sizes)
    return pack(keep), threshold


def topk_zero_(x: Tensor, k: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same, and what is not kept becomes 0 in place."""
    keep, threshold = select(x, k, sizes)
    raw(x).mul_(keep)  # integers: several times as fast as filling
    return pack(keep), threshold
