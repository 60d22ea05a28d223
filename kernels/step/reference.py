"""The masked local step in plain torch, operation by operation as torch.optim.SGD has them, so equal to it to the bit.

Some entries at a time: what is made on the way stays in a CPU's cache, and is never as large as a tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpipe.kernels.common import WORD

Tensors = dict[str, Tensor]
CHUNK = 2**16  # entries; a multiple of WORD


@dataclass(frozen=True)
class Numbers:
    """The scalars of a step. first: the momentum buffer holds nothing yet."""

    lr: float
    mu: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    first: bool = False


def step_(x: Tensor, g: Tensor, mask: Tensor | None, variate: Tensor | None, anchor: Tensor | None,
          buffer: Tensor | None, s: Numbers) -> None:  # fmt: skip
    """The step on x [..., n] and the buffer, in place; mask: words [..., words(n)], or [words(n)] for all rows."""
    if x.numel() <= CHUNK:
        _plain_(s, x, g, variate, anchor, buffer, mask)
        return
    n = x.shape[-1] if mask is not None else x.numel()
    rows = x.numel() // n
    if mask is not None and mask.dim() < x.dim():
        mask = mask.expand(rows, -1)
    given = {"x": x, "g": g, "variate": variate, "anchor": anchor, "buffer": buffer, "mask": mask}
    for part in _parts({name: t.view(rows, -1) for name, t in given.items() if t is not None}, rows, n):
        _plain_(s, **part)


def _parts(given: Tensors, rows: int, n: int) -> Iterator[Tensors]:
    """Views of whole rows of n entries, of at most CHUNK in all, or of at most CHUNK entries of one row."""
    if n <= CHUNK:
        for i in range(0, rows, CHUNK // n):
            yield {name: t[i : i + CHUNK // n] for name, t in given.items()}
        return
    for i in range(rows):
        row = {name: t[i] for name, t in given.items()}
        bits = row.pop("mask", None)
        for k in range(0, n, CHUNK):
            part = {name: t[k : k + CHUNK] for name, t in row.items()}
            yield part if bits is None else part | {"mask": bits[k // WORD : (k + CHUNK) // WORD]}


def _plain_(s: Numbers, x: Tensor, g: Tensor, variate: Tensor | None = None, anchor: Tensor | None = None,
            buffer: Tensor | None = None, mask: Tensor | None = None) -> None:  # fmt: skip
    d = g.to(x.dtype)
    if variate is not None:
        d = d - variate.to(x.dtype)
    if anchor is not None:
        d = d + (x - anchor).mul_(s.mu)
    if s.weight_decay:
        d = d.add(x, alpha=s.weight_decay)
    if buffer is not None:
        d = buffer.copy_(d) if s.first else buffer.mul_(s.momentum).add_(d)
    x.add_(d, alpha=-s.lr)
    if mask is not None:
        as_bits = torch.int32 if x.dtype == torch.float32 else torch.int64
        x.view(as_bits).bitwise_and_(kept(mask, x.shape[-1]))


def kept(packed: Tensor, n: int) -> Tensor:
    """int32 [..., n] of words [..., words(n)]: all bits set where an entry stays, none where it becomes 0."""
    left = torch.arange(WORD - 1, -1, -1, dtype=torch.int32, device=packed.device)
    full = (packed[..., None] << left).bitwise_right_shift_(WORD - 1).flatten(-2)
    return full[..., :n] if n % WORD else full
