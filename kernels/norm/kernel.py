"""Normalisation + ReLU in Triton: two launches forward, one for the recompute, two backward; no atomics.

Parts of a set follow from the shapes alone, and are merged in one order: a repetition gives the same bits.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from fedpipe.kernels.common import Variant
from fedpipe.kernels.norm.backward import dx_kernel, sums_kernel
from fedpipe.kernels.norm.forward import apply_kernel, moments_kernel

TILE = 2048  # entries: 16 a thread, four loads of 128 bits of float32 on their way at once
BLOCK = 1024  # of them in a row, at most
PROGRAMS = 4096  # about as many in all: a few waves of a large card
PARTS = 1024  # of a set, at most: every program that applies them reads them all


@dataclass(frozen=True)
class Plan:
    """sizes: the arguments that say where a set's entries are; constants: the shape of a tile, and how to index."""

    sets: int
    parts: int
    each: int
    columns: int
    sizes: dict[str, int]
    constants: dict[str, Any]
    channels: dict[str, int]

    @property
    def grid(self) -> tuple[int, int]:
        return self.sets, self.parts


def _pow2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _plan(x: Tensor, weight: Tensor, groups: int | None) -> Plan:
    channels, batch = weight.shape[-1], x.shape[weight.dim() - 1]
    clients, rows, inner = weight.numel() // channels, batch, channels
    sets, hw = weight.numel(), x.numel() // (weight.numel() * batch)
    if groups is not None:
        sets, rows, inner = clients * batch * groups, channels // groups, 1
    block = min(BLOCK, _pow2(hw))
    high = min(TILE // block, _pow2(rows))
    columns, unit = triton.cdiv(hw, block), gcd(hw, 16)
    tiles = columns * triton.cdiv(rows, high)
    each = triton.cdiv(tiles, min(PARTS, triton.cdiv(PROGRAMS, sets)))
    sizes = {"rows": rows, "inner": inner, "units": hw // unit}
    constants = {"UNIT": unit, "ROWS": high, "BLOCK": block, "WIDE": x.numel() >= 2**31}
    indexed = {"per_client": batch * (groups or 1), "groups": groups or 1, "GROUPED": groups is not None}
    return Plan(sets, triton.cdiv(tiles, each), each, columns, sizes, constants, indexed)


def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float,
              groups: int | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    plan, device = _plan(x, weight, groups), x.device
    shape = weight.shape if groups is None else (*x.shape[: weight.dim()], groups)
    mean, rstd = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    parts = torch.empty((3, *plan.grid), dtype=torch.float32, device=device)
    h = torch.empty_like(x)
    moments_kernel[plan.grid](x, parts, **plan.sizes, each=plan.each, **plan.constants)
    _apply(plan, x, h, parts, mean, rstd, weight, bias, eps)
    return h, mean, rstd


def norm_relu_again(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int | None) -> Tensor:
    h = torch.empty_like(x)
    _apply(_plan(x, weight, groups), x, h, None, mean, rstd, weight, bias, 0.0)
    return h


def _apply(plan: Plan, x: Tensor, h: Tensor, parts: Tensor | None, *given: Any) -> None:
    apply_kernel[plan.grid](
        x, h, parts, *given, **plan.sizes, each=plan.each, **plan.channels, **plan.constants,
        PARTS=1 if parts is None else _pow2(plan.parts),
    )  # fmt: skip


def norm_relu_backward(dh: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
                       groups: int | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    plan = _plan(x, weight, groups)
    given, shared = (mean, rstd, weight, bias), {**plan.sizes, **plan.channels, **plan.constants}
    rows = plan.sizes["rows"]
    count, each, grid = plan.parts, plan.each, plan.grid
    if groups is not None:
        count, each, grid = rows, plan.columns, (plan.sets, triton.cdiv(rows, plan.constants["ROWS"]))
    sums = torch.empty((2, plan.sets, count), dtype=torch.float32, device=x.device)
    sums_kernel[grid](x, dh, sums, *given, **shared, each=each)
    dx = torch.empty_like(x)
    dweight, dbias = (torch.empty_like(weight) if groups is None else None for _ in range(2))
    dx_kernel[plan.grid](
        x, dh, dx, sums, dweight, dbias, *given, count, **shared, each=plan.each, COUNT=_pow2(count),
    )  # fmt: skip
    if dweight is None or dbias is None:
        dbias, dweight = sums.view(2, -1, x.shape[weight.dim() - 1], weight.shape[-1]).sum(2).to(weight.dtype)
    return dx, dweight.view(weight.shape), dbias.view(weight.shape)


def _variant(kernel: Any, kind: str, groups: bool, parts: int = 64, streaming: bool = False) -> Variant:
    """A compilation for rows of a multiple of 16 entries; parts: 0 where there are none."""
    types = {n: f"*{kind}" if n in ("x", "h", "dh", "dx") else "*fp32" for n in kernel.arg_names}
    types |= dict.fromkeys(("rows", "inner", "units", "each", "per_client", "groups", "count"), "i32") | {"eps": "fp32"}
    constants: dict[str, Any] = {"UNIT": 16, "ROWS": 8, "BLOCK": 256, "WIDE": False, "GROUPED": groups}
    constants |= {"PARTS": parts, "COUNT": parts}
    constants |= {} if parts else {"parts": None, "PARTS": 1}
    constants |= {"dweight": None, "dbias": None} if groups else {}
    constants = {n: c for n, c in constants.items() if n in kernel.arg_names}
    return Variant(kernel, types, constants, streaming=streaming)


VARIANTS = {
    f"{name} {kind}{', groups' * groups}": _variant(kernel, kind, groups, parts, streaming)
    for kind in ("fp32", "bf16")
    for groups in (False, True)
    for name, kernel, parts, streaming in (
        ("moments", moments_kernel, 64, False),
        ("apply", apply_kernel, 64, True),
        ("again", apply_kernel, 0, True),
        ("sums", sums_kernel, 64, False),
        ("dx", dx_kernel, 64, True),
    )
    if not (groups and name == "moments")
}
