"""The weighted mean of ten clients: dense masks, sparse messages, windows."""

from typing import Any

import pytest
import torch
from rows import DEVICE, SMALL, Call, N, Row, compiled, run, unpacked
from torch import Tensor

from fedpipe.kernels import bits
from fedpipe.kernels.aggregate import Part, bytes_moved, weighted_mean

CLIENTS = 10


def clients(n: int, density: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The old values, and of each client its values and the bool mask of those that count."""
    old = torch.randn(n, device=DEVICE)
    masks = [torch.rand(n, device=DEVICE) < density for _ in range(CLIENTS)]
    return old, [torch.randn(n, device=DEVICE) for _ in range(CLIENTS)], masks


def eager(old: Tensor, values: list[Tensor], masks: list[Tensor]) -> Tensor:
    """Client by client, as a server without a kernel does it."""
    total, count = torch.zeros_like(old), torch.zeros_like(old)
    for x, m in zip(values, masks, strict=True):
        total.add_(x * m)
        count.add_(m)
    return torch.where(count > 0, total / count, old)


def from_words(old: Tensor, values: list[Tensor], words: list[Tensor]) -> Tensor:
    """All clients in one expression, with the mask format of the kernel, for a compiler to fuse."""
    total, count = torch.zeros_like(old), torch.zeros_like(old)
    for x, w in zip(values, words, strict=True):
        m = unpacked(w, old.numel()).to(old.dtype)
        total = total + x * m
        count = count + m
    return torch.where(count > 0, total / count, old)


def dense(n: int) -> tuple[Call, dict[str, Call]]:
    """torch may sum in float32; "float64" is the same sum at our precision."""
    old, values, _ = clients(n, 1.0)
    parts = [Part(x, 1.0) for x in values]

    def summed(dtype: torch.dtype) -> Tensor:
        total = torch.zeros_like(old, dtype=dtype)
        for x in values:
            total.add_(x)
        return total.div_(CLIENTS).to(old.dtype)

    return lambda: weighted_mean(old, parts), {
        "eager": lambda: summed(torch.float32),
        "float64": lambda: summed(torch.float64),
    }


def masked(n: int) -> tuple[Call, dict[str, Call]]:
    old, values, masks = clients(n, 0.5)
    words = [bits.pack(m) for m in masks]
    parts = [Part(x, 1.0, w) for x, w in zip(values, words, strict=True)]
    return lambda: weighted_mean(old, parts), {
        "eager": lambda: eager(old, values, masks),
        "words": lambda: eager(old, values, [unpacked(w, n) for w in words]),
        "compile": compiled(from_words, old, values, words),
    }


def sparse(n: int) -> tuple[Call, dict[str, Call]]:
    old, values, masks = clients(n, 0.1)
    few = [x[m] for x, m in zip(values, masks, strict=True)]
    parts = [Part(x, 1.0, bits.pack(m), sparse=True) for x, m in zip(few, masks, strict=True)]

    def decoded(masks: list[Tensor]) -> Tensor:
        return eager(old, [torch.zeros_like(old).masked_scatter_(m, x) for x, m in zip(few, masks, strict=True)], masks)

    return lambda: weighted_mean(old, parts), {
        "eager": lambda: decoded(masks),
        "words": lambda: decoded([unpacked(p.mask, n) for p in parts if p.mask is not None]),
    }


def window(n: int) -> tuple[Call, dict[str, Call]]:
    """Half of the rows and columns of a square matrix, the window moving on from client to client (FedRolex)."""
    side = int(n**0.5) // 32 * 32
    old, half = torch.randn(side, side, device=DEVICE), side // 2
    starts = [c * side // CLIENTS for c in range(CLIENTS)]
    values = [torch.randn(half, half, device=DEVICE) for _ in starts]
    parts = [Part(x, 1.0, windows=((0, s, s + half), (1, s, s + half))) for x, s in zip(values, starts, strict=True)]

    def indexed() -> Tensor:
        total, count = torch.zeros_like(old), torch.zeros_like(old)
        for x, s in zip(values, starts, strict=True):
            rows = (torch.arange(s, s + half, device=DEVICE) % side)[:, None]
            total[rows, rows.T] += x
            count[rows, rows.T] += 1
        return torch.where(count > 0, total / count, old)

    return lambda: weighted_mean(old, parts), {"eager": indexed}


LARGE = N if DEVICE == "cuda" else N // 4
LIMITS = {"copies": 6.84, "eager": 5.0, "compile": 0.97}
ROWS = [
    Row("mean of 10, dense", dense, lambda n: bytes_moved(n, CLIENTS, masked=False), n=LARGE),
    Row("mean of 10, masked", masked, lambda n: bytes_moved(n, CLIENTS), n=LARGE, limits=LIMITS),
    Row("mean of 10, sparse 0.1", sparse, lambda n: bytes_moved(n, CLIENTS, density=0.1), n=LARGE),
    Row("mean of 10, windows", window, lambda n: bytes_moved(n, CLIENTS, masked=False, density=0.25), n=LARGE),
    Row("mean of 10, masked, small", masked, lambda n: bytes_moved(n, CLIENTS), n=SMALL),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_aggregate(row: Row, benchmark: Any) -> None:
    run(row, benchmark)
