"""Bit masks in plain torch; on a CPU by numpy, which packs bits and compares some ten times faster."""

from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from torch import Tensor

from fedpipe.kernels.common import WORD, words

CHUNK = 3 * 2**14  # entries, a multiple of WORD: what is made of so many on the way stays in a core's cache
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def raw(x: Tensor) -> Tensor:
    """The integers that entries are stored as, a view: two are equal if and only if their bits are."""
    return x.detach().view(_INTEGERS[x.itemsize])


def chunks(tensors: list[Tensor], n: int) -> Iterator[tuple[Tensor, ...]]:
    """Views of entries [rows, n] and words [rows, words(n)] side by side: of whole rows, or of a part of one, of at
    most CHUNK entries."""
    if tensors[0].numel() <= CHUNK:
        yield tuple(tensors)
    elif n <= CHUNK:
        yield from zip(*(t.split(CHUNK // n) for t in tensors), strict=True)
    else:
        for row in zip(*(t.unbind() for t in tensors), strict=True):
            yield from zip(*(t.split(CHUNK if len(t) == n else CHUNK // WORD) for t in row), strict=True)


def _real(t: Tensor) -> bool:
    """Whether numpy can read it: a fake tensor, by which memory is predicted, has nothing to read."""
    return t.device.type == "cpu" and type(t) is Tensor


def reached(key: Tensor, least: Tensor) -> Tensor:
    """The mask of key >= least; of integers."""
    return torch.from_numpy(key.numpy() >= least.numpy()) if _real(key) else key >= least


def pack(mask: Tensor) -> Tensor:
    """Words [..., words(n)] of a mask [..., n]."""
    n = mask.shape[-1]
    full = torch.nn.functional.pad(mask, (0, words(n) * WORD - n)) if n % WORD else mask
    if _real(mask):
        return torch.from_numpy(np.packbits(full.numpy(), axis=-1, bitorder="little").view(np.int32))
    bits = full.unflatten(-1, (words(n), WORD))
    return (bits.long() * _powers(mask.device)).sum(-1).to(torch.int32)  # the top bit wraps round to the sign


def unpack(packed: Tensor, n: int) -> Tensor:
    """Mask [..., n] of words [..., words(n)]."""
    if _real(packed):
        octets = np.unpackbits(packed.numpy().view(np.uint8), axis=-1, count=n, bitorder="little")
        return torch.from_numpy(octets.view(np.bool_))
    return (packed[..., None].long() & _powers(packed.device)).ne(0).flatten(-2)[..., :n]


def positions(packed: Tensor, n: int) -> Tensor:
    """Entries whose bit in words [words(n)] is set, ascending, int64."""
    if not _real(packed):
        return unpack(packed, n).nonzero().squeeze(1)
    octets = packed.numpy().view(np.uint8)
    if 10 * int(popcount(packed)) > n:
        return torch.from_numpy(np.flatnonzero(np.unpackbits(octets, bitorder="little").view(np.bool_)))
    # numpy searches fast only where more than a tenth is set: elsewhere in the octets that are not 0
    some = np.flatnonzero(octets != 0)
    at = np.flatnonzero(np.unpackbits(octets[some], bitorder="little").view(np.bool_))
    return torch.from_numpy((some << 3).take(at >> 3) + (at & 7))


def popcount(packed: Tensor) -> Tensor:
    """Set bits of each row of words, int64 [...]."""
    if _real(packed):
        counts = np.bitwise_count(packed.numpy().view(np.uint32)).sum(-1, dtype=np.int64)
        return torch.from_numpy(np.asarray(counts))
    return unpack(packed, packed.shape[-1] * WORD).sum(-1)


def threshold_zero_(x: Tensor, threshold: Tensor) -> Tensor:
    """Words of `not |x| < threshold`; entries whose bit is 0 become 0 in place. threshold: one per row [...].

    Magnitudes are compared as integers, whose order is theirs, with every NaN last."""
    n, rows = x.shape[-1], prod(x.shape[:-1])
    out = torch.empty((*x.shape[:-1], words(n)), dtype=torch.int32, device=x.device)
    if not x.numel():
        return out
    stored, packed = raw(x).view(rows, n), out.view(rows, words(n))
    least = raw(threshold).view(rows, 1).expand_as(packed)
    for part, t, kept in chunks([stored, least, packed], n):
        keep = reached(part & torch.iinfo(part.dtype).max, t[..., :1])
        kept.copy_(pack(keep))
        part.mul_(keep)
    return out


def _powers(device: torch.device) -> Tensor:
    return torch.ones(WORD, dtype=torch.int64, device=device) << torch.arange(WORD, device=device)
