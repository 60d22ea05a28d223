"""A FeDepth round as the paper's published code runs it (arXiv 2303.04887), in plain torch.

One client after another. A client trains its blocks in turn: in every batch the frozen units before it run again,
then the block, the link, the shared head. One SGD optimizer of a client-round; frozen tensors have no gradient.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS: list[list[tuple[int, ...]]] = [  # of budgets of 1/6, 1/3, 1/2 and all of what the whole network takes
    [(1,), (2,), (3,), (4,), (5, 6), (7, 8, 9)],
    [(1, 2), (3, 4), (5, 6, 7, 8, 9)],
    [(1, 2, 3), (4, 5, 6, 7, 8, 9)],
    [(1, 2, 3, 4, 5, 6, 7, 8, 9)],
]
Batches = Callable[[int], Iterator[Tensor]]  # of a phase, as rows


class Block(nn.Module):
    def __init__(self, inward: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inward, track_running_stats=False)
        self.conv1 = nn.Conv2d(inward, out, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out, track_running_stats=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inward, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        return self.conv2(F.relu(self.norm2(self.conv1(h)))) + self.shortcut(h)


class PreResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv, norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16, track_running_stats=False)
        self.stem = nn.Sequential(OrderedDict(conv=conv, norm=norm))
        inward, out = [16] * 4 + [32] * 3 + [64] * 2, [16] * 3 + [32] * 3 + [64] * 3
        for k, (i, o) in enumerate(zip(inward, out, strict=True), 1):
            self.add_module(f"b{k}", Block(i, o, 1 if i == o else 2))
        norm, linear = nn.BatchNorm2d(64, track_running_stats=False), nn.Linear(64, 10)
        self.head = nn.ModuleDict(OrderedDict(norm=norm, linear=linear))

    def forward(self, x: Tensor, upto: int) -> Tensor:
        x = self.stem(x)
        for k in range(1, upto + 1):
            x = self.get_submodule(f"b{k}")(x)
        if upto < 4:
            x = F.pad(x[:, :, ::4, ::4], (0, 0, 0, 0, 24, 24))
        elif upto < 7:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 16, 16))
        x = F.relu(self.head["norm"](x)).mean((2, 3))
        return self.head["linear"](x)


def train(
    net: PreResNet20, x: Tensor, y: Tensor, blocks: Sequence[Sequence[int]], batches: Batches
) -> list[tuple[float, float]]:
    """Local training of a client from the values that net has; first and last loss of each phase."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    losses = []
    for phase, block in enumerate(blocks):
        net.requires_grad_(False)
        optimizer.zero_grad()
        for unit in (*(["stem"] if block[0] == 1 else []), *(f"b{k}" for k in block), "head"):
            net.get_submodule(unit).requires_grad_(True)
        seen = []
        for rows in batches(phase):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[rows], block[-1]), y[rows])
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
        losses.append((float(seen[0]), float(seen[-1])))
    return losses


def drawn(count: int, size: int, epochs: int) -> Batches:
    """A new permutation of all rows in every epoch."""

    def batches(phase: int) -> Iterator[Tensor]:
        for _ in range(epochs):
            yield from torch.randperm(count).split(size)

    return batches


def average(states: Sequence[dict[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Mean of state dicts, weighted by numbers of samples."""
    total = sum(sizes)
    return {name: sum(s[name] * (n / total) for s, n in zip(states, sizes, strict=True)) for name in states[0]}
