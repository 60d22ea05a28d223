"""Blocks that save less: one training step of a PreResNet block and of a ViT layer, forward and backward.

Of a layer the norms are liger's where it is installed, on a GPU; rows that are only about that are left out elsewhere.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rows import DEVICE, Call, Row, compiled, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedpipe.kernels import liger
from fedpipe.models.norms import layer_norm
from fedpipe.models.preresnet import Block
from fedpipe.models.vit import EPS, Layer

BATCH = 128
SHAPES = ((16, 32), (32, 16), (64, 8))  # channels and side of PreResNet-20's three stages
TOKENS = (BATCH, 65, 192)  # of ViT-Tiny
LIGER = liger.runs("auto", torch.empty(1, 1, device=DEVICE))


def stepped(unit: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Call:
    """Gradients of the input and of every parameter."""
    wanted, seed = [x, *unit.parameters()], torch.randn_like(x)
    return lambda: torch.autograd.grad(forward(x), wanted, seed)


def made(unit: nn.Module, shape: tuple[int, ...], level: int) -> tuple[Call, dict[str, Call]]:
    unit = unit.to(DEVICE)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    ready: list[Any] = []

    def by_compiler(x: Tensor) -> Tensor:
        if not ready:
            ready.append(torch.compile(unit, dynamic=False))
        out: Tensor = ready[0](x)
        return out

    norms = {"torch's norms": stepped(unit, x, lambda x: unit(x, level=level, backend="reference"))}
    return stepped(unit, x, lambda x: unit(x, level=level, backend="auto")), {
        "eager": stepped(unit, x, unit),
        "checkpoint": stepped(unit, x, lambda x: checkpoint(unit, x, use_reentrant=False)),
        "compile": stepped(unit, x, by_compiler),
        **(norms if LIGER and level and isinstance(unit, Layer) else {}),
    }


def block(channels: int, side: int) -> Row:
    shape = (BATCH, channels, side, side)
    n = BATCH * channels * side * side
    unit = lambda: Block(channels, channels, 1, "batch", 1.0)  # noqa: E731
    # two norms: read twice and written, read and written again, and 20 bytes an entry backward; convolutions apart
    return Row(f"block {channels}x{side}x{side}", lambda n: made(unit(), shape, 1), lambda n: 80.0 * n, n=n,
               limits={"eager": 1 / 1.02})  # fmt: skip


def layer(level: int, limits: dict[str, float]) -> Row:
    n = prod(TOKENS)
    return Row(f"vit layer, level {level}", lambda n: made(Layer(192, 3, 768), TOKENS, level), lambda n: 64.0 * n, n=n,
               limits=limits)  # fmt: skip


def layer_norms() -> Row:
    def make(n: int) -> tuple[Call, dict[str, Call]]:
        shapes = (TOKENS, TOKENS[-1:], TOKENS[-1:])
        leaves = [torch.randn(s, device=DEVICE, requires_grad=True) for s in shapes]
        dy = torch.randn(TOKENS, device=DEVICE)
        theirs = lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS)  # noqa: E731
        fused = compiled(theirs, *leaves)
        return lambda: torch.autograd.grad(layer_norm(*leaves, EPS, "auto"), leaves, dy), {
            "eager": lambda: torch.autograd.grad(theirs(*leaves), leaves, dy),
            "compile": lambda: torch.autograd.grad(fused(), leaves, dy),
        }

    # read and written; the gradient and x read, and dx written
    return Row("layer norm, liger's", make, lambda n: 20.0 * n, n=prod(TOKENS))


ROWS = [
    *(block(*shape) for shape in SHAPES),
    *([layer_norms(), layer(0, {})] if LIGER else []),
    layer(1, {"eager": 1 / 1.03}),
    layer(2, {"eager": 1 / 1.12}),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_recompute(row: Row, benchmark: Any) -> None:
    run(row, benchmark)
