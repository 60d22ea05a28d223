"""Entries that a mask marks, packed one after another, and back; a tenth of them is marked."""

from typing import Any

import pytest
import torch
from rows import DEVICE, SMALL, Call, Row, compiled, run, unpacked

from fedpipe.kernels import bits, sparse

DENSITY = 0.1


def marked(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.rand(n, device=DEVICE) < DENSITY
    return torch.randn(n, device=DEVICE), mask, bits.pack(mask)


def encode(n: int) -> tuple[Call, dict[str, Call]]:
    """torch.compile has no counterpart: the size of what comes out is read from the data."""
    x, mask, words = marked(n)
    return lambda: sparse.encode(x, words), {
        "eager": lambda: x[mask],
        "nonzero": lambda: x[mask.nonzero().squeeze(1)],
        "words": lambda: x[unpacked(words, n)],
    }


def encode_counted(n: int) -> tuple[Call, dict[str, Call]]:
    """Nothing waits for the device where the number of entries is known."""
    x, mask, words = marked(n)
    nnz = int(bits.popcount(words))
    return lambda: sparse.encode(x, words, nnz), {
        "eager": lambda: x[mask],
        "nonzero": lambda: x[torch.nonzero_static(mask, size=nnz).squeeze(1)],
    }


def encode_indices(n: int) -> tuple[Call, dict[str, Call]]:
    x, mask, words = marked(n)

    def nonzero() -> tuple[torch.Tensor, torch.Tensor]:
        at = mask.nonzero().squeeze(1)
        return at.int(), x[at]

    return lambda: sparse.encode_indices(x, words), {"nonzero": nonzero}


def decode(n: int) -> tuple[Call, dict[str, Call]]:
    x, mask, words = marked(n)
    values = x[mask]

    def assigned() -> torch.Tensor:
        out = torch.zeros(n, device=DEVICE)
        out[mask] = values
        return out

    def spread(values: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return torch.zeros(n, device=DEVICE).masked_scatter_(unpacked(words, n), values)

    return lambda: sparse.decode(values, words, n), {
        "eager": assigned,
        "masked_scatter": lambda: torch.zeros(n, device=DEVICE).masked_scatter_(mask, values),
        "words": lambda: spread(values, words),
        "compile": compiled(spread, values, words),
    }


def decode_indices(n: int) -> tuple[Call, dict[str, Call]]:
    x, mask, words = marked(n)
    indices, values = sparse.encode_indices(x, words)
    return lambda: sparse.decode_indices(indices, values, n), {
        "eager": lambda: torch.zeros(n, device=DEVICE).index_put_((indices,), values),
        "scatter": lambda: torch.zeros(n, device=DEVICE).scatter_(0, indices.long(), values),
    }


def row(name: str, make: Any, op: str, **keywords: Any) -> Row:
    return Row(name, make, lambda n: sparse.bytes_moved(op, n, DENSITY), **keywords)


ROWS = [
    row("encode", encode, "encode", limits={"copies": 0.75}),
    row("encode, small", encode, "encode", n=SMALL),
    row("encode, number known", encode_counted, "encode", limits={"copies": 0.75}),
    row("encode with indices", encode_indices, "encode_indices"),
    row("decode", decode, "decode", limits={"copies": 0.67}),
    row("decode, small", decode, "decode", n=SMALL),
    row("decode from indices", decode_indices, "decode_indices"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_sparse(row: Row, benchmark: Any) -> None:
    run(row, benchmark)
