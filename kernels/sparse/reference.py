"""Sparse vectors in plain torch: the positions of set bits, and what is taken from there or spread to there."""

import torch
from torch import Tensor

from fedpipe.kernels.bits.reference import positions


def encode(x: Tensor, words: Tensor, nnz: int | None = None) -> Tensor:
    return x.index_select(0, positions(words, x.numel()))


def encode_indices(x: Tensor, words: Tensor, nnz: int | None = None) -> tuple[Tensor, Tensor]:
    at = positions(words, x.numel())
    return at.to(torch.int32), x.index_select(0, at)


def decode(values: Tensor, words: Tensor, n: int) -> Tensor:
    return _spread(positions(words, n), values, n)


def decode_indices(indices: Tensor, values: Tensor, n: int) -> Tensor:
    return _spread(indices.long(), values, n)


def _spread(at: Tensor, values: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=values.dtype, device=values.device).scatter_(0, at, values)
