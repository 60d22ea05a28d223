"""Sparse vectors in plain torch; on a CPU by numpy, which finds set entries some three times faster."""

import numpy as np
import torch
from torch import Tensor

from fedpipe.kernels.bits import reference as bits


def positions(words: Tensor, n: int) -> np.ndarray:
    """Entries whose bit is set, ascending."""
    octets = words.numpy().view(np.uint8)
    nnz = int(np.bitwise_count(words.numpy().view(np.uint32)).sum())
    if n / 32 < nnz <= n / 10:
        # numpy searches without branches only where more than a tenth is set: ones past the end make it so
        octets = np.concatenate([octets, np.full(n // 72 + 1, 255, np.uint8)])
    return np.flatnonzero(np.unpackbits(octets, bitorder="little").view(np.bool_))[:nnz]


def encode(x: Tensor, words: Tensor, nnz: int | None = None) -> Tensor:
    if x.device.type != "cpu":
        return x[bits.unpack(words, x.numel())]
    return torch.from_numpy(x.numpy().take(positions(words, x.numel())))


def encode_indices(x: Tensor, words: Tensor, nnz: int | None = None) -> tuple[Tensor, Tensor]:
    if x.device.type != "cpu":
        at = bits.unpack(words, x.numel()).nonzero().squeeze(1)
        return at.to(torch.int32), x[at]
    found = positions(words, x.numel())
    return torch.from_numpy(found.astype(np.int32)), torch.from_numpy(x.numpy().take(found))


def decode(values: Tensor, words: Tensor, n: int) -> Tensor:
    out = torch.zeros(n, dtype=values.dtype, device=values.device)
    if values.device.type != "cpu":
        return out.masked_scatter_(bits.unpack(words, n), values)
    return out.scatter_(0, torch.from_numpy(positions(words, n)), values)


def decode_indices(indices: Tensor, values: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=values.dtype, device=values.device).scatter_(0, indices.long(), values)
