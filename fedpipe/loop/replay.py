"""Captured steps replayed: on CUDA, what a step launches is recorded once as a graph, and started as a whole later.

A graph reads and writes the very memory it was recorded on. So what a phase works on lies in an `Arena`, which stays
where it is from phase to phase, and what comes anew with every step, its batch, is copied to where the graph reads it.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fedpipe.types import Tensors

Scales = tuple[float, float]


class Graph(Protocol):
    """What replays a function of no arguments that gives tensors."""

    def record(self, work: Callable[[], list[Tensor]]) -> None:
        """Note what `work` does. RuntimeError where that cannot be replayed."""

    def replay(self) -> list[Tensor]:
        """Do it again: tensors that the next replay of any graph may write over."""


class CudaGraph:
    """A CUDA graph; all of a device take the memory of their intermediate values from one pool, one after another."""

    def __init__(self, device: torch.device):
        self.device = device

    def record(self, work: Callable[[], list[Tensor]]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(self.graph, pool=_pool(self.device)):
            self.out = work()

    def replay(self) -> list[Tensor]:
        self.graph.replay()
        return self.out


@cache
def _pool(device: torch.device) -> Any:
    return torch.cuda.graph_pool_handle()


@dataclass
class Recorded:
    """A graph with the memory it reads and the numbers it holds as constants."""

    graph: Graph
    given: list[Tensor]
    scales: Scales


class Arena:
    """Memory for the tensors of phases of one layout, and the graphs that were recorded on it."""

    def __init__(self, graph: Callable[[], Graph]):
        self.graph = graph
        self.memory: Tensors = {}
        self.loaded: set[Callable[..., Any]] = set()  # what ran once
        self.known: dict[Callable[..., Any], Recorded | None] = {}  # None: it cannot be recorded

    def placed(self, tensors: Tensors) -> Tensors:
        """These tensors, copied to where tensors of their names lie."""
        for name, t in tensors.items():
            mine = self.memory.get(name)
            if mine is None:
                self.memory[name] = t.clone()
            elif mine is not t:
                mine.copy_(t)
        return {n: self.memory[n] for n in tensors}

    def taken(self, values: dict[str, Any]) -> dict[str, Any]:
        """These values, tensors that lie here copied out of it: the next phase writes over them."""
        here = {id(t) for t in self.memory.values()}
        return {n: v.clone() if id(v) in here else v for n, v in values.items()}

    def run(self, work: Callable[..., Any], given: list[Tensor], scales: Scales) -> list[Tensor]:
        """`work(*given, *scales)`: as it is at first, since what a graph launches has to be loaded before."""
        if work not in self.loaded:
            self.loaded.add(work)
            return [*work(*given, *scales)]
        known = self.known.get(work)
        if work not in self.known or (known and known.scales != scales):
            known = self.known[work] = self._record(work, given, scales)
        if known is None:
            return [*work(*given, *scales)]
        for mine, now in zip(known.given, given, strict=True):
            if mine is not now:
                mine.copy_(now, non_blocking=True)
        return [t.clone() for t in known.graph.replay()]

    def _record(self, work: Callable[..., Any], given: list[Tensor], scales: Scales) -> Recorded | None:
        """A graph of the work on memory that stays: what lies here, and copies of the rest."""
        here = {id(t) for t in self.memory.values()}
        stays = [t if id(t) in here else t.clone() for t in given]
        recorded = Recorded(self.graph(), stays, scales)
        try:
            recorded.graph.record(lambda: [*work(*stays, *scales)])
        except RuntimeError:
            return None
        return recorded


class Replays:
    """The arenas of a process by the layout of what lies in them."""

    def __init__(self, graph: Callable[[], Graph]):
        self.graph = graph
        self.arenas: dict[Hashable, Arena] = {}

    def arena(self, tensors: Tensors) -> Arena:
        """Where these tensors are to lie."""
        layout = tuple((n, t.shape, t.stride(), t.dtype) for n, t in tensors.items())
        return self.arenas.setdefault(layout, Arena(self.graph))


@cache
def replays(device: torch.device) -> Replays | None:
    """Those of a device; None where it has no graphs."""
    return Replays(lambda: CudaGraph(device)) if device.type == "cuda" else None
