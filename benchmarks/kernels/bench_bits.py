"""Masks as words, and cutting a buffer at a threshold in place."""

from typing import Any

import pytest
import torch
from rows import DEVICE, SMALL, Call, Row, compiled, run

from fedpipe.kernels import bits


def threshold(n: int) -> tuple[Call, dict[str, Call]]:
    """Over and over on one buffer: after the first call the same entries stay, the bytes moved are the same."""
    x = torch.randn(n, device=DEVICE)
    t = torch.ones((), device=DEVICE)
    return lambda: bits.threshold_zero_(x, 1.0), {
        "eager": lambda: x.mul_(x.abs() >= 1.0),
        "compile": compiled(bits.reference.threshold_zero_, x, t),
    }


def pack(n: int) -> tuple[Call, dict[str, Call]]:
    mask = torch.rand(n, device=DEVICE) < 0.1
    return lambda: bits.pack(mask), {
        "eager": lambda: bits.reference.pack(mask),
        "compile": compiled(bits.reference.pack, mask),
    }


ROWS = [
    Row("threshold and zero", threshold, lambda n: bits.bytes_moved("threshold_zero_", n), limits={"copies": 1.13}),
    Row("threshold and zero, small", threshold, lambda n: bits.bytes_moved("threshold_zero_", n), n=SMALL),
    Row("pack", pack, lambda n: bits.bytes_moved("pack", n)),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_bits(row: Row, benchmark: Any) -> None:
    run(row, benchmark)
