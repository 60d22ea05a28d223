"""The weighted mean of what clients hold of one tensor, folded as they arrive, in plain torch."""

from collections.abc import Iterable
from itertools import groupby
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fedpipe.kernels.bits import reference as bits

MANY = 8  # clients that wait for one another
WAIT = 16 << 20  # bytes of values that wait, where these are more than two clients': more save no time
BLOCK = 3 << 13  # entries whose sums, values and mask, in float64, take 0.75 MiB, and stay in a cache
Window = tuple[int, int, int]  # dimension, start, stop (exclusive); a stop past the end wraps round


class Part(NamedTuple):
    """What one client holds of a tensor: values of its windows' entries, of which `mask` (words) says which count; or,
    where sparse, the values of just these, in order."""

    values: Tensor
    weight: float
    mask: Tensor | None = None
    windows: tuple[Window, ...] = ()
    sparse: bool = False


def region(shape: torch.Size, windows: Iterable[Window]) -> tuple[Tensor | slice, ...]:
    """Index of the entries that windows leave of a tensor."""
    spans = {dim: (start, stop) for dim, start, stop in windows}
    if all(stop <= shape[d] for d, (_, stop) in spans.items()):
        return tuple(slice(*spans[d]) if d in spans else slice(None) for d in range(len(shape)))
    ranges = [torch.arange(*spans[d]) % n if d in spans else torch.arange(n) for d, n in enumerate(shape)]
    return torch.meshgrid(*ranges, indexing="ij")


def held(shape: torch.Size, windows: Iterable[Window]) -> tuple[int, ...]:
    """Shape of what windows leave of a tensor."""
    spans = {dim: stop - start for dim, start, stop in windows}
    return tuple(spans.get(d, n) for d, n in enumerate(shape))


class Fold:
    """Sums in float64 of one tensor and of the weights of its entries.

    A few clients wait for one another and are then folded block by block, so that a block's sums stay in the cache:
    three times as fast as one client after another, and the same bits.
    """

    def __init__(self, old: Tensor, sums: tuple[Tensor, Tensor] | None = None):
        self.old, self.waiting = old, list[Part]()
        self.most = min(MANY, max(2, WAIT // max(1, old.nbytes)))
        self.total, self.weight = sums or (
            torch.zeros(old.shape, dtype=torch.float64, device=old.device),
            torch.zeros((), dtype=torch.float64, device=old.device),  # of every entry, until one differs
        )

    def add(self, part: Part) -> None:
        """Take one client's part."""
        self.waiting.append(part)
        if len(self.waiting) == self.most:
            self._fold()

    def result(self) -> Tensor:
        """The mean; entries nobody holds keep the old value. Ends the fold."""
        self._fold()
        mean = self.total.div_(self.weight).to(self.old.dtype)
        return mean if not self.weight.ndim and self.weight > 0 else torch.where(self.weight > 0, mean, self.old)

    def _fold(self) -> None:
        parts, self.waiting = self.waiting, []
        if not self.weight.ndim and any(p.windows or p.mask is not None for p in parts):
            self.weight = self.weight.expand(self.old.shape).clone()
        for alone, some in groupby(parts, key=lambda p: bool(p.windows) or p.sparse):
            if not alone:
                self._blocks(list(some))
                continue
            for part in some:
                (self._window if part.windows else self._entries)(part)

    def _window(self, part: Part) -> None:
        shape = held(self.old.shape, part.windows)
        mask = None if part.mask is None else bits.unpack(part.mask, prod(shape)).view(shape)
        values = part.values if mask is None or not part.sparse else _decoded(part.values, mask)
        at = region(self.old.shape, part.windows)
        if mask is not None:
            self.total[at] += part.weight * (values * mask).double()
            self.weight[at] += part.weight * mask.double()
        elif all(isinstance(i, slice) for i in at):  # a view: added to in place, without a copy of its entries
            self.total[at].add_(values, alpha=part.weight)
            self.weight[at].add_(part.weight)
        else:
            self.total[at] += part.weight * values.double()
            self.weight[at] += part.weight

    def _entries(self, part: Part) -> None:
        """Of a sparse part without windows: only its entries are read and written."""
        assert part.mask is not None
        at = bits.positions(part.mask, self.old.numel())
        wide = part.values.double() * part.weight
        self.total.view(-1).index_add_(0, at, wide)
        self.weight.view(-1).index_add_(0, at, wide.fill_(part.weight))

    def _blocks(self, parts: list[Part]) -> None:
        n = self.old.numel()
        masks = [p.mask if p.mask is None else bits.unpack(p.mask, n).view(torch.uint8).split(BLOCK) for p in parts]
        values = [p.values.view(-1).split(BLOCK) for p in parts]
        scratch = self.total.new_empty(2, min(n, BLOCK))
        weights = self.weight.view(-1).split(BLOCK)
        for b, total in enumerate(self.total.view(-1).split(BLOCK)):
            wide, ones = scratch[:, : len(total)]
            for part, x, mask in zip(parts, values, masks, strict=True):
                if mask is None:
                    total.add_(x[b], alpha=part.weight)
                    if self.weight.ndim:
                        weights[b].add_(part.weight)
                    continue
                ones.copy_(mask[b])  # from bytes: twice as fast as from bools
                total.addcmul_(wide.copy_(x[b]), ones, value=part.weight)
                weights[b].add_(ones, alpha=part.weight)
        if not self.weight.ndim:
            for part in parts:
                self.weight += part.weight if part.mask is None else 0.0  # of a mask they are added by then


def _decoded(values: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(mask, values)
