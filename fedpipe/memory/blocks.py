"""Blocks of channels that oneDNN copies operands into, and the columns that torch unfolds images into: their bytes."""

import os
from math import prod
from typing import Any

import torch
from torch import Tensor


def _block() -> int:
    """Channels that fill a register of the instructions oneDNN takes."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return 16 if torch.cpu._is_avx512_supported() and most.startswith(("AVX512", "AVX10", "DEFAULT", "ALL")) else 8


BLOCK, HALF = _block(), 8


def fill(count: int, block: int = BLOCK) -> int:
    return -(-count // block) * block


def blocked(t: Tensor, block: int = BLOCK) -> int:
    """Bytes of [N, C, ...] with the channels filled up to whole blocks."""
    return t.shape[0] * fill(t.shape[1], block) * prod(t.shape[2:]) * t.element_size()


def depthwise(w: Tensor, groups: int) -> bool:
    """Whether every channel has filters of its own: they are what is blocked then."""
    return groups > 1 and groups == w.shape[0] and w.shape[1] == 1


def blocked_weight(w: Tensor, groups: int, block: int = BLOCK) -> int:
    if depthwise(w, groups):
        return fill(groups) * prod(w.shape[2:]) * w.element_size()
    channels = groups * fill(w.shape[0] // groups, block) * fill(w.shape[1], block)
    return channels * prod(w.shape[2:]) * w.element_size()


def gathered(x: Tensor, w: Tensor, out: Tensor, geometry: list[Any]) -> int:
    """A strided 1x1 filter gathers the pixels of one image that it reads."""
    strided = prod(w.shape[2:]) == 1 and max(geometry[0]) > 1
    return prod(out.shape[2:]) * fill(x.shape[1]) * x.element_size() + 128 if strided else 0


def columns(x: Tensor, w: Tensor, out: Tensor, groups: int) -> int:
    """Bytes of the unfolded columns of one group."""
    if groups == 1 and prod(w.shape[2:]) == 1 and x.shape[2:] == out.shape[2:]:
        return 0  # the images are their own columns
    return x.shape[0] * prod(w.shape[1:]) * prod(out.shape[2:]) * x.element_size()


def beyond(x: Tensor, w: Tensor) -> bool:
    """Whether images are smaller than the filters."""
    return any(a < b for a, b in zip(x.shape[2:], w.shape[2:], strict=True))


def grouped_backward(x: Tensor, w: Tensor, grad: Tensor, strided: bool, groups: int, mask: list[bool]) -> int:
    """Of a convolution in groups, channels first: blocks are no wider than a group, and groups of less than half a
    block are read as they are."""
    inward, outward = w.shape[1], w.shape[0] // groups
    few = min(inward, outward)
    block = BLOCK if few % BLOCK == 0 else HALF
    weight = groups * fill(outward, block) * fill(inward, block) * prod(w.shape[2:]) * w.element_size()
    kept, to_x, to_w = x.nbytes if mask[0] else 0, 0, 0
    if few < HALF:
        return 2 * kept + w.nbytes + (grad.nbytes // len(x) if not mask[0] else 0)
    if mask[0]:
        made = blocked(x, block)
        to_x = (2 if outward <= BLOCK else 3) * kept if strided else blocked(grad, block) + weight + made
    if mask[1]:
        to_w = kept + weight + max(blocked(x, block) + blocked(grad, block), w.nbytes)
    return max(to_x, to_w)
