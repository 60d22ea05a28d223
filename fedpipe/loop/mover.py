"""How the leaves of a phase move: the study's optimizer, or the step that the phase names."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fedpipe import tracing
from fedpipe.config import Optimizer
from fedpipe.kernels.common import Backend
from fedpipe.loop.fused import MOMENTUM, Fused
from fedpipe.loop.lower import Sgd
from fedpipe.loop.replay import Arena
from fedpipe.types import Step, Tensors

Slots = dict[str, dict[str, Any]]  # optimizer state by name


def optimizer(spec: Optimizer, leaves: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """The study's optimizer of these leaves, one after another: all at once takes another model's bytes on the way."""
    wd = spec.weight_decay
    tracing.load()
    if spec.name == "sgd":
        return torch.optim.SGD(leaves, lr=lr, momentum=spec.momentum, weight_decay=wd, foreach=False)
    kind = torch.optim.Adam if spec.name == "adam" else torch.optim.AdamW
    return kind(leaves, lr=lr, weight_decay=wd, foreach=False)


class Mover:
    """The leaves of one phase, of a client or a stack, and their optimizer's state in `slots`.

    Plain SGD is `sgd`: a captured step moves leaves and `buffers` by it within itself (by `scales`), and gives no
    direction. What gives directions has them applied by `move`.
    """

    def __init__(self, who: str, spec: Optimizer, step: Step | None, lr: float, leaves: Tensors, carried: Slots,
                 at: Tensors, stacked: bool, kernel: Backend):  # fmt: skip
        self.leaves, self.lr = leaves, lr
        self.slots: Slots = {n: dict(carried.get(n, {})) for n in leaves}
        self.scales = (-lr, 1 - lr * spec.weight_decay)
        plain = spec.name == "sgd" and step is None
        self.sgd = Sgd(spec.momentum, spec.weight_decay) if plain else None
        self.buffers: Tensors = {}
        self.fused = Fused(who, spec, step, lr, leaves, at, stacked, kernel) if step else None
        self.torch: torch.optim.Optimizer | None = None
        if self.sgd and self.sgd.momentum:
            for n, leaf in leaves.items():
                self.buffers[n] = self.slots[n].setdefault(MOMENTUM, torch.zeros_like(leaf))
        elif spec.name != "sgd":
            self.torch = optimizer(spec, leaves.values(), lr)
            for n, leaf in leaves.items():
                self.torch.state[leaf] = self.slots[n]

    def place(self, arena: Arena) -> None:
        """Have the buffers that a captured step moves lie where it is replayed."""
        for n, buffer in self.buffers.items():
            name = f"{MOMENTUM}/{n}"
            self.buffers[n] = self.slots[n][MOMENTUM] = arena.placed({name: buffer})[name]

    def move(self, d: Tensors, at: Tensors) -> None:
        """Move the leaves that have a direction."""
        if not d:
            return
        if self.sgd is not None:
            for n, g in d.items():
                self.sgd.move(self.leaves[n], g, self.buffers.get(n), self.lr)
        elif self.fused and self.fused.whole:
            self.fused(self.leaves, d, at, self.slots)
        else:
            self._by_torch(self.fused.direction(self.leaves, d, at) if self.fused else d)

    def _by_torch(self, d: Tensors) -> None:
        assert self.torch is not None
        for n, leaf in self.leaves.items():
            leaf.grad = d.get(n)
        self.torch.step()
        self.torch.zero_grad(set_to_none=True)
        if self.fused:
            self.fused.project(self.leaves)

    def moved(self) -> list[Tensor]:
        """All that moves with a step: leaves, and their slots of the same shape."""
        slots = [v for n, s in self.slots.items() for v in s.values()
                 if isinstance(v, Tensor) and v.shape == self.leaves[n].shape]  # fmt: skip
        return [*self.leaves.values(), *slots]
