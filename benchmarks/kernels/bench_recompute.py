"""Blocks that save less: one training step of a PreResNet block and of a ViT layer, forward and backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rows import DEVICE, Call, Row, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedpipe.models.preresnet import Block
from fedpipe.models.vit import Layer

BATCH = 128
SHAPES = ((16, 32), (32, 16), (64, 8))  # channels and side of PreResNet-20's three stages


def stepped(unit: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Call:
    """Gradients of the input and of every parameter."""
    wanted, seed = [x, *unit.parameters()], torch.randn_like(x)
    return lambda: torch.autograd.grad(forward(x), wanted, seed)


def made(unit: nn.Module, shape: tuple[int, ...], level: int) -> tuple[Call, dict[str, Call]]:
    unit = unit.to(DEVICE)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    compiled: list[Any] = []

    def by_compiler(x: Tensor) -> Tensor:
        if not compiled:
            compiled.append(torch.compile(unit, dynamic=False))
        out: Tensor = compiled[0](x)
        return out

    return stepped(unit, x, lambda x: unit(x, level=level)), {
        "eager": stepped(unit, x, unit),
        "checkpoint": stepped(unit, x, lambda x: checkpoint(unit, x, use_reentrant=False)),
        "compile": stepped(unit, x, by_compiler),
    }


def block(channels: int, side: int) -> Row:
    shape = (BATCH, channels, side, side)
    n = BATCH * channels * side * side
    unit = lambda: Block(channels, channels, 1, "batch", 1.0)  # noqa: E731
    # two norms: read twice and written, read and written again, and 20 bytes an entry backward; convolutions apart
    return Row(f"block {channels}x{side}x{side}", lambda n: made(unit(), shape, 1), lambda n: 80.0 * n, n=n,
               limits={"eager": 1 / 1.02})  # fmt: skip


def layer(level: int, slower: float) -> Row:
    shape = (BATCH, 65, 192)
    n = BATCH * 65 * 192
    return Row(f"vit layer, level {level}", lambda n: made(Layer(192, 3, 768), shape, level), lambda n: 64.0 * n, n=n,
               limits={"eager": 1 / slower})  # fmt: skip


ROWS = [*(block(*shape) for shape in SHAPES), layer(1, 1.03), layer(2, 1.12)]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_recompute(row: Row, benchmark: Any) -> None:
    run(row, benchmark)
