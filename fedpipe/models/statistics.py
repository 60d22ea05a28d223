"""Batch norm at evaluation by statistics of training data, where a model keeps none: then no row's result depends on
who else is in its batch (HeteroFL's static batch norm, arXiv 2010.01264)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.models.chain import Chain

Key = tuple[str, int]


@dataclass
class Seen:
    """Sums over rows of a layer's input: its batches' means [C] and unbiased variances [C]. `weight` is whose it is."""

    weight: Tensor
    mean: Tensor
    variance: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        others = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x, others)
        self.mean, self.variance, self.rows = (
            self.mean + len(x) * mean,
            self.variance + len(x) * variance,
            self.rows + len(x),
        )


class Statistics:
    """Of a chain's batch norms that keep none, for every set of parameters it is run with.

    with statistics.applied():
        statistics.estimate(run, batches)   # what run(batch) uses and has not been seen yet
        run(other)                          # by these statistics
    """

    def __init__(self, chain: Chain):
        self.layers = {
            n: m
            for n, m in chain.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.track_running_stats
        }
        self.known: dict[Key, Seen] = {}
        self.new: dict[Key, Seen] | None = None  # while they are estimated

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the norms use what is known, and their batch's own statistics where nothing is."""
        handles = [m.register_forward_hook(self._hook(n)) for n, m in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def estimate(self, run: Callable[[Any], Any], batches: Iterable[Any]) -> None:
        """Means over the rows of batches, all norms by their batch's own statistics meanwhile; none where all that
        run(batch) uses is known."""
        for i, batch in enumerate(batches):
            self.new = {} if not i else self.new
            run(batch)
            if not i and not self.new:
                break
        self.known |= self.new or {}
        self.new = None

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(layer: Any, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            (x,), key = given, (name, id(layer.weight))
            seen = self.known.get(key)
            if seen is not None:
                mean, variance = seen.mean / seen.rows, seen.variance / seen.rows
                return F.batch_norm(x, mean, variance, layer.weight, layer.bias, False, 0.0, layer.eps)
            if self.new is not None:
                zero = torch.zeros_like(layer.weight)
                self.new.setdefault(key, Seen(layer.weight, zero, zero)).add(x)
            return None

        return hook
