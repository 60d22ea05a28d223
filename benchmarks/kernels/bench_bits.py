"""Masks as words, and cutting a buffer at a threshold in place."""

from typing import Any

import pytest
import torch
from rows import DEVICE, SMALL, Call, Row, compiled, run, unpacked
from torch import Tensor

from fedpipe.kernels import bits


def packed(mask: Tensor) -> Tensor:
    """Words of a mask whose entries fill them, in the shortest expression."""
    bit = torch.arange(32, device=mask.device)
    return (mask.view(-1, 32).long() << bit).sum(1).int()


def threshold(n: int) -> tuple[Call, dict[str, Call]]:
    """Over and over on one buffer: after the first call the same entries stay, the bytes moved are the same."""
    x = torch.randn(n, device=DEVICE)

    def cut(x: Tensor) -> Tensor:
        keep = x.abs() >= 1.0
        x.mul_(keep)
        return packed(keep)

    return lambda: bits.threshold_zero_(x, 1.0), {
        "eager": lambda: x.mul_(x.abs() >= 1.0),
        "words": lambda: cut(x),
        "compile": compiled(cut, x),
    }


def pack(n: int) -> tuple[Call, dict[str, Call]]:
    mask = torch.rand(n, device=DEVICE) < 0.1
    return lambda: bits.pack(mask), {
        "eager": lambda: packed(mask),
        "compile": compiled(packed, mask),
    }


def unpack(n: int) -> tuple[Call, dict[str, Call]]:
    words = bits.pack(torch.rand(n, device=DEVICE) < 0.1)
    return lambda: bits.unpack(words, n), {
        "eager": lambda: unpacked(words, n),
        "compile": compiled(unpacked, words, n),
    }


def popcount(n: int) -> tuple[Call, dict[str, Call]]:
    mask = torch.rand(n, device=DEVICE) < 0.1
    words = bits.pack(mask)
    return lambda: bits.popcount(words), {
        "eager": lambda: mask.sum(),
        "words": lambda: unpacked(words, n).sum(),
    }


ROWS = [
    Row("threshold and zero", threshold, lambda n: bits.bytes_moved("threshold_zero_", n), limits={"copies": 1.13}),
    Row("threshold and zero, small", threshold, lambda n: bits.bytes_moved("threshold_zero_", n), n=SMALL),
    Row("pack", pack, lambda n: bits.bytes_moved("pack", n)),
    Row("unpack", unpack, lambda n: bits.bytes_moved("unpack", n)),
    Row("popcount", popcount, lambda n: bits.bytes_moved("popcount", n)),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_bits(row: Row, benchmark: Any) -> None:
    run(row, benchmark)
