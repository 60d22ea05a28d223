"""Bit masks in plain torch; on a CPU by numpy, which packs bits some ten times faster."""

import numpy as np
import torch
from torch import Tensor

from fedpipe.kernels.common import WORD, words


def _powers(device: torch.device) -> Tensor:
    return torch.ones(WORD, dtype=torch.int64, device=device) << torch.arange(WORD, device=device)


def pack(mask: Tensor) -> Tensor:
    """Words [..., words(n)] of a mask [..., n]."""
    n = mask.shape[-1]
    full = torch.nn.functional.pad(mask, (0, words(n) * WORD - n)) if n % WORD else mask
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(full.numpy(), axis=-1, bitorder="little").view(np.int32))
    bits = full.unflatten(-1, (words(n), WORD))
    return (bits.long() * _powers(mask.device)).sum(-1).to(torch.int32)  # the top bit wraps round to the sign


def unpack(packed: Tensor, n: int) -> Tensor:
    """Mask [..., n] of words [..., words(n)]."""
    if packed.device.type == "cpu":
        raw = np.unpackbits(packed.numpy().view(np.uint8), axis=-1, count=n, bitorder="little")
        return torch.from_numpy(raw.view(np.bool_))
    return (packed[..., None].long() & _powers(packed.device)).ne(0).flatten(-2)[..., :n]


def popcount(packed: Tensor) -> Tensor:
    """Set bits of each row of words, int64 [...]."""
    if packed.device.type == "cpu":
        counts = np.bitwise_count(packed.numpy().view(np.uint32)).sum(-1, dtype=np.int64)
        return torch.as_tensor(counts)
    return unpack(packed, packed.shape[-1] * WORD).sum(-1)


def threshold_zero_(x: Tensor, threshold: Tensor) -> Tensor:
    """Words of `not |x| < threshold`; entries whose bit is 0 become 0 in place. threshold: one per row [...]."""
    keep = (x.abs() < threshold[..., None]).logical_not_()
    x.mul_(keep).add_(0.0)  # twice as fast as filling; adding 0 takes the sign from -0
    return pack(keep)
