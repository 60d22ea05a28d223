"""Dropout whose masks are drawn with the other draws of a step: it can be captured, stacked and repeated exactly."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

PREFIX = "tmp/noise/"  # of a mask's working name


class Dropout(nn.Module):
    """Zeroes each entry with probability p in training and scales the others by 1 / (1 - p).

    `keep` is the mask of a batch, bool and of its shape, given as a buffer for the call; without one of that shape it
    is drawn from torch's global generator. p is taken as a multiple of 1/256, or of 1/65536 where it is no such.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.bits = 8 if float(p * 256).is_integer() else 16
        self.cut = round(p * 2**self.bits)  # drawn numbers below it are zeroed
        self.p = self.cut / 2**self.bits
        self.shape: tuple[int, ...] = ()  # of one sample, once it has seen some
        self.keep: Tensor
        self.register_buffer("keep", torch.empty(0, dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.shape = tuple(x.shape[1:])
            return x
        if self.keep.shape != x.shape:
            return F.dropout(x, self.p)
        return x * (self.keep.to(x.dtype) * (1 / (1 - self.p)))

    @property
    def bytes(self) -> int:
        """Drawn for one sample."""
        return int(np.prod(self.shape)) * self.bits // 8

    def mask(self, drawn: NDArray[np.uint8]) -> Tensor:
        """The mask of drawn bytes [rows, bytes]."""
        return torch.from_numpy(drawn.view(f"<u{self.bits // 8}") >= self.cut).view(-1, *self.shape)


class Noise:
    """The draws of a chain's dropout layers: called with a bit generator and a number of rows, it gives masks by name.

    A row's bytes for all layers are drawn before the next row's, so that rows of padding change none before them.
    """

    def __init__(self, layers: Sequence[tuple[str, Dropout]]) -> None:
        self.layers = dict(layers)

    def __call__(self, gen: np.random.BitGenerator, rows: int, units: Sequence[str]) -> dict[str, Tensor]:
        """Masks [rows, ...] of the layers in these units, in the chain's order."""
        run = {n: d for n, d in self.layers.items() if n.split(".")[0] in units}
        width = sum(d.bytes for d in run.values())
        raw = gen.random_raw(-(-rows * width // 8)).astype("<u8", copy=False)
        drawn = raw.view(np.uint8)[: rows * width].reshape(rows, width)
        starts = np.cumsum([0, *(d.bytes for d in run.values())])
        return {PREFIX + n: d.mask(drawn[:, i : i + d.bytes]) for i, (n, d) in zip(starts, run.items(), strict=False)}

    def __bool__(self) -> bool:
        return bool(self.layers)


def aside(gen: np.random.Generator) -> np.random.BitGenerator:
    """A stream beside a generator's own, which does not move."""
    assert isinstance(gen.bit_generator, np.random.Philox)
    return gen.bit_generator.jumped()


def own_dropout(model: nn.Module) -> Noise:
    """Put this dropout in the place of torch's in a model; returns its draws."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout and not child.inplace:
                setattr(module, name, Dropout(child.p))
    return Noise([(n, m) for n, m in model.named_modules() if isinstance(m, Dropout) and m.p])
