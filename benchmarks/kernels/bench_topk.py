"""Exact Top-K by magnitude, of a whole buffer and of each of a hundred layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rows import DEVICE, SMALL, Call, Row, run
from torch import Tensor

from fedpipe.kernels import topk

DENSITY = 0.1
LAYERS = 100


def scattered(x: Tensor, k: int, largest: Callable[[Tensor], Tensor]) -> Tensor:
    """The mask of what a function says are the largest magnitudes' indices."""
    return torch.zeros(x.shape, dtype=torch.bool, device=x.device).scatter_(0, largest(x.abs())[:k], True)


def whole(dtype: torch.dtype, sort: bool = False) -> Callable[[int], tuple[Call, dict[str, Call]]]:
    def make(n: int) -> tuple[Call, dict[str, Call]]:
        x, k = torch.randn(n, device=DEVICE).to(dtype), int(DENSITY * n)
        baselines: dict[str, Call] = {
            "eager": lambda: scattered(x, k, lambda a: a.topk(k).indices),
            "topk": lambda: scattered(x, k, lambda a: a.topk(k, sorted=False).indices),
        }
        if sort:
            baselines["sort"] = lambda: scattered(x, k, lambda a: a.argsort(descending=True))
        return lambda: topk.topk_mask(x, k), baselines

    return make


def layers(n: int) -> tuple[Call, dict[str, Call]]:
    x = torch.randn(n, device=DEVICE)
    sizes = [n // LAYERS] * (LAYERS - 1) + [n - n // LAYERS * (LAYERS - 1)]
    k = [int(DENSITY * size) for size in sizes]

    def loop() -> Tensor:
        keep = torch.zeros(n, dtype=torch.bool, device=DEVICE)
        for part, out, count in zip(x.split(sizes), keep.split(sizes), k, strict=True):
            out.scatter_(0, part.abs().topk(count, sorted=False).indices, True)
        return keep

    return lambda: topk.topk_mask(x, k, sizes), {"topk": loop}


def zeroed(n: int) -> tuple[Call, dict[str, Call]]:
    """Each call starts from a fresh copy, on both sides."""
    source, k = torch.randn(n, device=DEVICE), int(DENSITY * n)
    x = torch.empty_like(source)
    return lambda: topk.topk_zero_(x.copy_(source), k), {
        "topk": lambda: x.copy_(source).mul_(scattered(x, k, lambda a: a.topk(k, sorted=False).indices)),
    }


def moved(op: str, itemsize: int = 4) -> Callable[[int], float]:
    return lambda n: topk.bytes_moved(op, n, itemsize)


ROWS = [
    Row("top-k", whole(torch.float32), moved("topk_mask"), limits={"copies": 0.83, "topk": 8}),
    Row("top-k, bfloat16", whole(torch.bfloat16), moved("topk_mask", 2)),
    Row("top-k, 100 layers", layers, moved("topk_mask"), limits={"copies": 0.94, "topk": 8}),
    Row("top-k and zero, and a copy", zeroed, lambda n: topk.bytes_moved("topk_zero_", n) + 8 * n),
    Row("top-k, small", whole(torch.float32, sort=True), moved("topk_mask"), n=SMALL),
    Row("top-k, 100 layers, small", layers, moved("topk_mask"), n=SMALL),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_topk(row: Row, benchmark: Any) -> None:
    run(row, benchmark)
