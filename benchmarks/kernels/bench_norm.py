"""Normalisation by a batch's statistics and ReLU, forward and backward, against torch's with autograd."""

from functools import partial
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rows import DEVICE, Call, Row, compiled, run
from torch import Tensor

from fedpipe.kernels.norm import bytes_moved, norm_relu, norm_relu_backward

EPS, BATCH = 1e-5, 128
LAYERS = ((16, 32, 32), (32, 16, 16), (64, 8, 8))  # of PreResNet-20
LARGE = (64, 32, 32)


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS).relu()


def make(n: int, shape: tuple[int, ...] = LARGE) -> tuple[Call, dict[str, Call]]:
    x, dh = (torch.randn(n // prod(shape), *shape, device=DEVICE) for _ in range(2))
    weight, bias = (torch.randn(shape[0], device=DEVICE) for _ in range(2))
    leaves = tuple(t.detach().requires_grad_() for t in (x, weight, bias))  # they share memory with ours

    def ours() -> tuple[Tensor, ...]:
        _, mean, rstd = norm_relu(x, weight, bias, EPS)
        return norm_relu_backward(dh, x, mean, rstd, weight, bias)

    fused = compiled(forward, *leaves)
    return ours, {
        "eager": lambda: torch.autograd.grad(forward(*leaves), leaves, dh),
        "compile": lambda: torch.autograd.grad(fused(), leaves, dh),
    }


def moved(n: int) -> float:
    return bytes_moved("norm_relu", n) + bytes_moved("norm_relu_backward", n)


ROWS = [
    *(
        Row(f"batch norm and ReLU, {'x'.join(map(str, s))}", partial(make, shape=s), moved, n=BATCH * prod(s))
        for s in LAYERS
    ),
    Row("batch norm and ReLU", make, moved),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_norm(row: Row, benchmark: Any) -> None:
    run(row, benchmark)
