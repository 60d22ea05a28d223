"""The masked local step in Triton: every entry is read and written once. Layout and grid as in `bits`."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fedpipe.kernels.bits.kernel import tile
from fedpipe.kernels.common import Variant, words
from fedpipe.kernels.step.reference import Numbers

TILE = 32  # words of a program: 1,024 entries


@triton.jit
def step_kernel(
    x, g, mask, variate, anchor, buffer, lr, mu, momentum, weight_decay, n, count, mask_row,
    FIRST: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """count: words of a row; mask_row: words from one row's mask to the next, 0 where rows share one."""
    row = tl.program_id(1).to(tl.int64)
    word, bit, at = tile(W, WIDE)
    inside = at < n
    at = row * n + at
    here = tl.load(x + at, mask=inside, other=0.0)
    d = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    if variate is not None:
        d -= tl.load(variate + at, mask=inside, other=0.0).to(tl.float32)
    if anchor is not None:
        d += mu * (here - tl.load(anchor + at, mask=inside, other=0.0))
    d += weight_decay * here
    if buffer is not None:
        if not FIRST:
            d += momentum * tl.load(buffer + at, mask=inside, other=0.0)
        tl.store(buffer + at, d, mask=inside)
    here -= lr * d
    if mask is not None:
        w = tl.load(mask + row * mask_row + word, mask=word < count, other=0)
        here = tl.where(((w[:, None] >> bit[None, :]) & 1) != 0, here, 0.0)
    tl.store(x + at, here, mask=inside)


def step_(x: Tensor, g: Tensor, mask: Tensor | None, variate: Tensor | None, anchor: Tensor | None,
          buffer: Tensor | None, s: Numbers) -> None:  # fmt: skip
    """As the reference's, x, anchor and buffer in float32."""
    if not x.numel():
        return
    n = x.shape[-1] if mask is not None else x.numel()
    step_kernel[(triton.cdiv(words(n), TILE), x.numel() // n)](
        x, g, mask, variate, anchor, buffer, s.lr, s.mu, s.momentum, s.weight_decay,
        n, words(n), 0 if mask is None or mask.dim() == 1 else words(n),
        FIRST=s.first, W=TILE, WIDE=n >= 2**31,
    )  # fmt: skip


def _variant(mask: str = "*i32", variate: str = "*fp32", anchor: str = "", buffer: str = "",
             g: str = "*fp32") -> Variant:  # fmt: skip
    """A compilation; an argument without a type is None."""
    pointers = {"x": "*fp32", "g": g, "mask": mask, "variate": variate, "anchor": anchor, "buffer": buffer}
    scalars = dict.fromkeys(("lr", "mu", "momentum", "weight_decay"), "fp32")
    sizes = dict.fromkeys(("n", "count", "mask_row"), "i32")
    constants: dict[str, Any] = {p: None for p, type in pointers.items() if not type}
    constants |= {"FIRST": False, "W": TILE, "WIDE": False}
    return Variant(step_kernel, pointers | scalars | sizes, constants, aligned=("n",))


VARIANTS = {
    "plain": _variant(),
    "unmasked": _variant(mask=""),
    "momentum": _variant(buffer="*fp32"),
    "proximal": _variant(variate="", anchor="*fp32"),
    "everything": _variant(anchor="*fp32", buffer="*fp32"),
    "bf16": _variant(g="*bf16", variate="*bf16"),
}
