"""The weighted mean of many small tensors that clients hold whole: side by side in one buffer, so that a client costs
two operations for all of them. On a CPU; the bits are those of a `Fold` for each."""

from math import isfinite, prod

import torch
from torch import Tensor

from fedpipe.kernels.aggregate import reference

MANY = reference.MANY  # clients that wait for one another, so that a bundle's sums stay in the cache meanwhile
ROOM = 1 << 15  # entries of a bundle: their sums and a client's values, in float64, take 0.5 MiB
EVEN = 32  # entries; where each tensor begins, so that its mean is as aligned as memory of its own


class Bundle:
    """Sums in float64 of some of the tensors, of one type."""

    def __init__(self, old: dict[str, Tensor]):
        self.places = dict[str, tuple[torch.Size, list[int], int]]()  # shape, strides, first entry
        n = 0
        for name, t in old.items():
            self.places[name] = (t.shape, _strides(t.shape), n)
            n += _even(t.numel())
        self.dtype = next(iter(old.values())).dtype
        self.total, self.values = torch.zeros(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
        self.views = self.shaped(self.values)

    def shaped(self, flat: Tensor) -> list[Tensor]:
        """Each tensor's part of a buffer."""
        return [flat.as_strided(*place) for place in self.places.values()]

    def add(self, tensors: dict[str, Tensor], weight: float) -> None:
        """Fold one client's values in."""
        torch._foreach_copy_(self.views, [tensors[n] for n in self.places])
        self.total.add_(self.values, alpha=weight)

    def result(self, weight: Tensor) -> dict[str, Tensor]:
        """The means, views of one new buffer."""
        return dict(zip(self.places, self.shaped(self.total.div_(weight).to(self.dtype)), strict=True))


class Whole:
    """Means of the tensors `old`, all on a CPU: `add` each client's, then `result`, or `apart` when one holds less."""

    def __init__(self, old: dict[str, Tensor]):
        self.old, self.waiting = old, list[tuple[dict[str, Tensor], float]]()
        self.weight = 0.0
        self.like = {n: (t.shape, t.dtype) for n, t in old.items()}
        self.bundles = [Bundle(some) for some in _bundled(old)]

    @staticmethod
    def small(tensor: Tensor) -> bool:
        """Whether a tensor is one to be folded here."""
        return tensor.device.type == "cpu" and 0 < tensor.numel() <= ROOM

    def takes(self, tensors: dict[str, Tensor], weight: float) -> bool:
        """Whether these hold every entry of every tensor; what is wrong with others is for `Fold` to say."""
        if not (isfinite(weight) and weight > 0):
            return False
        return all(n in tensors and (tensors[n].shape, tensors[n].dtype) == is_ for n, is_ in self.like.items())

    def add(self, tensors: dict[str, Tensor], weight: float) -> None:
        """Take one client's tensors; others that come with them are not held on to."""
        self.waiting.append(({n: tensors[n] for n in self.old}, weight))
        if len(self.waiting) == MANY:
            self._fold()

    def result(self) -> dict[str, Tensor]:
        """The means, new tensors; the old ones where no client came. Ends the fold."""
        self._fold()
        if not self.weight > 0:
            return {n: t.clone() for n, t in self.old.items()}
        weight = torch.tensor(self.weight, dtype=torch.float64)
        return {n: t for b in self.bundles for n, t in b.result(weight).items()}

    def apart(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of each tensor and of its entries' weight so far, for a fold of its own to go on from."""
        self._fold()
        sums = {n: s for b in self.bundles for n, s in zip(b.places, b.shaped(b.total), strict=True)}
        return {n: (s, torch.tensor(self.weight, dtype=torch.float64)) for n, s in sums.items()}

    def _fold(self) -> None:
        for bundle in self.bundles:
            for tensors, weight in self.waiting:
                bundle.add(tensors, weight)
        for _, weight in self.waiting:
            self.weight += weight
        self.waiting = []


def _bundled(old: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in their order, as many of one type together as a bundle holds."""
    out: list[dict[str, Tensor]] = []
    room, dtype = 0, None
    for name, t in old.items():
        if not out or t.numel() > room or t.dtype != dtype:
            out.append({})
            room, dtype = ROOM, t.dtype
        out[-1][name] = t
        room -= _even(t.numel())
    return out


def _strides(shape: torch.Size) -> list[int]:
    """Of a contiguous tensor."""
    return [prod(shape[d + 1 :]) for d in range(len(shape))]


def _even(n: int) -> int:
    return -(-n // EVEN) * EVEN
