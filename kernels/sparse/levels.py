"""Values in few bits: symmetric levels times the largest magnitude, packed r bits each.

With r bits there are 2 L + 1 levels, L = 2**(r - 1) - 1, and value = scale * (level / L): the entry of largest
magnitude lies on level L or -L exactly, so a second quantisation finds the same scale, the same levels and the same
values. One bit has levels -1 and 1, and 0 for entries that are 0, which a message leaves out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedpipe.kernels import bits
from fedpipe.kernels.common import wanted
from fedpipe.kernels.common import words as words_of

FEWEST, MOST = 1, 8  # bits of a level


class Quantised(NamedTuple):
    """levels: int8, shaped as the tensor; scale: its largest magnitude, float32 []."""

    levels: Tensor
    scale: Tensor


def top(r: int) -> int:
    """L, the highest level of r bits."""
    if not FEWEST <= r <= MOST:
        raise ValueError(f"bits: {r}; wanted {FEWEST} to {MOST}")
    return max(1, 2 ** (r - 1) - 1)


def quantise(x: Tensor, r: int, noise: Tensor | None = None) -> Quantised:
    """Levels of r bits of a float32 tensor, and its scale.

    noise: uniform in [0, 1), shaped as x, for stochastic rounding, which keeps the mean; without it, to the nearest.
    Raises ValueError for other types and shapes, and where x is not finite.
    """
    highest = top(r)
    wanted("x", x := x.contiguous(), (torch.float32,))
    scale = x.abs().amax() if x.numel() else x.new_zeros(())
    if not bool(scale.isfinite()):
        raise ValueError("x: NaN or infinite entries; wanted finite ones")
    at = torch.where(scale > 0, x / scale, 0.0).abs_().mul_(highest)
    if noise is not None:
        wanted("noise", noise.contiguous(), (torch.float32,), tuple(x.shape), like=x)
        at = at.add_(noise).floor_().clamp_(max=highest)
    levels = at.round_() if r > 1 else at.ceil_()
    return Quantised((levels * x.sign()).to(torch.int8), scale)


def dequantise(quantised: Quantised, r: int) -> Tensor:
    """The float32 values that levels of r bits stand for."""
    highest = torch.full_like(quantised.scale, top(r))  # torch multiplies by 1 / L on a GPU where L is a number
    return quantised.scale * (quantised.levels.float() / highest)


def pack_levels(levels: Tensor, r: int) -> Tensor:
    """int32 words [words(m r)] of m levels, entry i in bits r i to r i + r - 1; at r = 1 none may be 0."""
    code = (levels.flatten().short() + top(r)).to(torch.uint8) if r > 1 else levels.flatten() > 0
    each = torch.arange(r, dtype=torch.uint8, device=levels.device)
    return bits.pack(((code[:, None] >> each) & 1).bool().flatten())


def unpack_levels(name: str, packed: Tensor, r: int, m: int) -> Tensor:
    """int8 levels [m] of words; raises ValueError where a code stands for no level, or bits past the last are set."""
    highest = top(r)
    wanted(name, packed, (torch.int32,), (words_of(m * r),))
    if not m:
        return packed.new_empty(0, dtype=torch.int8)
    if m * r % 32 and int(packed[-1]) >> (m * r % 32):
        raise ValueError(f"{name}: bits past the last of {m} levels are set; wanted 0 there")
    each = torch.arange(r, dtype=torch.uint8, device=packed.device)
    code = (bits.unpack(packed, m * r).view(m, r).to(torch.uint8) << each).sum(1, dtype=torch.int16)
    if r == 1:
        return (2 * code - 1).to(torch.int8)
    if int(code.max()) > 2 * highest:
        raise ValueError(f"{name}: code {int(code.max())}; wanted at most {2 * highest} at {r} bits")
    return (code - highest).to(torch.int8)
