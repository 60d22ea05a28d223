"""Weighted mean of clients' tensors, entry by entry over those who hold it: dense, masked, of a window (HeteroFL,
FedRolex), or a sparse message decoded on the fly. Entries nobody holds keep the old value.

Clients are folded in the order they arrive; sums are kept in float64, so that a repetition gives the same bits.
"""

from math import isfinite, prod

import torch
from torch import Tensor

from fedpipe.kernels.aggregate import reference
from fedpipe.kernels.aggregate.reference import Part, Window, held, region
from fedpipe.kernels.aggregate.whole import Whole
from fedpipe.kernels.common import Backend, chosen, wanted, words

__all__ = ["Fold", "Part", "Whole", "Window", "bytes_moved", "held", "region", "weighted_mean"]
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Fold:
    """The mean of one tensor `old`, any shape: `add` a `Part` per client, then `result`.

    sums: on a CPU, of values and weights of clients that are folded already, float64, which it goes on from."""

    def __init__(self, old: Tensor, backend: Backend = "auto", sums: tuple[Tensor, Tensor] | None = None):
        wanted("old", old, FLOATS)
        self.old, self.clients = old, 0
        if chosen(backend, old):
            from fedpipe.kernels.aggregate import kernel

            self.fold: reference.Fold | kernel.Fold = kernel.Fold(old)
        else:
            self.fold = reference.Fold(old, sums)

    def add(self, part: Part) -> None:
        """Raises ValueError, before anything is folded, for a weight that is no positive number, windows that do not
        fit, values or a mask of another size, type or device than the old tensor and the windows ask for."""
        self._check(part, f"client {self.clients}")
        self.clients += 1
        self.fold.add(part)

    def result(self) -> Tensor:
        """The mean in the type of `old`, a new tensor."""
        return self.fold.result()

    def _check(self, part: Part, who: str) -> None:
        if not (isfinite(part.weight) and part.weight > 0):
            raise ValueError(f"{who}: weight {part.weight}; wanted a number > 0")
        shape = self.old.shape
        for dim, start, stop in part.windows:
            if not (0 <= dim < len(shape) and 0 <= start < stop and stop - start <= shape[dim] and start < shape[dim]):
                raise ValueError(f"{who}: window {start}..{stop} of dimension {dim}; wanted one within {tuple(shape)}")
        size = held(shape, part.windows)
        n = prod(size)
        if part.mask is not None:
            wanted(f"{who}: mask", part.mask, (torch.int32,), (words(n),), self.old)
        elif part.sparse:
            raise ValueError(f"{who}: sparse without a mask; wanted the words of the entries its values are of")
        wanted(f"{who}: values", part.values, (self.old.dtype,), None if part.sparse else size, self.old)
        if part.sparse and part.mask is not None:
            held_bits = int(reference.bits.popcount(part.mask))
            wanted(f"{who}: values", part.values, (self.old.dtype,), (held_bits,), self.old)


def weighted_mean(old: Tensor, parts: list[Part], backend: Backend = "auto") -> Tensor:
    """`Fold` over parts at hand."""
    fold = Fold(old, backend)
    for part in parts:
        fold.add(part)
    return fold.result()


def bytes_moved(n: int, clients: int, masked: bool = True, density: float | None = None, itemsize: int = 4) -> float:
    """Bytes of a mean over n entries: every client's values (of its share `density` where sparse) and mask bits once,
    the old value and the new one."""
    each = itemsize * (1 if density is None else density) + (masked or density is not None) / 8
    return n * (clients * each + 2 * itemsize)
