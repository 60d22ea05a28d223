"""The masked local step in plain torch, operation by operation as torch.optim.SGD has them, so equal to it to the bit.

Some entries at a time: what is made on the way stays in a CPU's cache, and is never as large as a tensor.
"""

from dataclasses import dataclass

from torch import Tensor

from fedpipe.kernels.bits.reference import chunks, raw, unpack


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
    if not x.numel():
        return
    n = x.shape[-1] if mask is not None else x.numel()
    rows = x.numel() // n
    given = {"x": x, "g": g, "variate": variate, "anchor": anchor, "buffer": buffer}
    tensors = {name: t.view(rows, n) for name, t in given.items() if t is not None}
    if mask is not None:
        tensors["mask"] = mask.view(-1, mask.shape[-1]).expand(rows, -1)
    for part in chunks(list(tensors.values()), n):
        _plain_(s, **dict(zip(tensors, part, strict=True)))


def _plain_(s: Numbers, x: Tensor, g: Tensor, mask: Tensor | None = None, **others: Tensor) -> None:
    x.add_(_direction(s, x, g, **others), alpha=-s.lr)  # freed before the mask, which then takes its place in the cache
    if mask is not None:
        raw(x).mul_(unpack(mask, x.shape[-1]))  # integers: what is masked becomes 0 even if it was NaN


def _direction(s: Numbers, x: Tensor, g: Tensor, variate: Tensor | None = None, anchor: Tensor | None = None,
               buffer: Tensor | None = None) -> Tensor:  # fmt: skip
    d = g.to(x.dtype)
    if variate is not None:
        d = d - variate.to(x.dtype)
    if anchor is not None:
        d = (x - anchor).mul_(s.mu).add_(d)
    if s.weight_decay:
        d = d.add(x, alpha=s.weight_decay)
    if buffer is not None:
        d = buffer.copy_(d) if s.first else buffer.mul_(s.momentum).add_(d)
    return d
