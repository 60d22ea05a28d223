"""What operations allocate for themselves while they run, by the allocator's records: on a CPU, but for cuBLASLt.

Convolutions of float32 are oneDNN's: the operands are copied into blocks of channels, the result is made in blocks and
copied out; the gradient of the input is made first and held while that of the weight is made. Blocks have 16 channels
with AVX-512 (8 for the weight's gradient of narrow layers), 8 with AVX2. Where torch takes its own convolution
(float64, single images, few 1x1 filters) it unfolds the columns of the whole batch into one matrix. The backward of a
batch norm makes the gradient of its input twice.
"""

import os
from math import prod
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _block() -> int:
    """Channels that fill a register of the instructions oneDNN takes."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return 16 if torch.cpu._is_avx512_supported() and most.startswith(("AVX512", "AVX10", "DEFAULT", "ALL")) else 8


BLOCK, HALF = _block(), 8
STRIDED = 53_272  # bytes of scratch seen at most for the gradient of a strided convolution's input
LT = 2**20  # bytes cuBLASLt takes for a product with a bias, and gives back (seen on an H200, torch 2.11)
PLAIN = 3  # channels up to which the weight's gradient takes images, and its own, as they are


def workspace(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """Peak bytes, results included, that operation `func` allocates while it runs; 0 where only its results count."""
    if func is aten.convolution.default:
        x, w, bias, *geometry, groups = args
        if x.device.type != "cpu":
            return 0
        if _onednn(x, w, bias, geometry, groups):
            return _onednn_forward(x, w, out, geometry, groups)
        return (2 if groups > 1 else 1) * out.nbytes + _columns(x, w, out, groups)
    if func is aten.convolution_backward.default:
        grad, x, w, _, *geometry, groups, mask = args
        if x.device.type != "cpu":
            return 0
        if _onednn(x, w, None, geometry, groups):
            return _onednn_backward(x, w, grad, geometry, groups, mask)
        made = (x.nbytes if mask[0] else 0) + (w.nbytes if mask[1] else 0)
        return (2 if groups > 1 else 1) * made + _columns(x, w, grad, groups)
    if func is aten.addmm.default and args[1].device.type == "cuda":
        return out.nbytes + LT
    if func is aten.native_batch_norm_backward.default:
        return _norm_backward(args[0], args[1], args[-1], out)
    return 0


def _onednn(x: Tensor, w: Tensor, bias: Tensor | None, geometry: list[Any], groups: int) -> bool:
    return torch._C._select_conv_backend(x, w, bias, *geometry, groups).name.startswith("Mkldnn")


def _norm_backward(grad: Tensor, x: Tensor, mask: list[bool], out: Any) -> int:
    """The gradient of the input is allocated, then allocated anew where both are contiguous in the same order."""
    if x.device.type != "cpu" or not mask[0] or not (_order(grad) and _order(grad) == _order(x)):
        return 0
    return x.nbytes + sum(t.nbytes for t in out if t is not None)


def _order(t: Tensor) -> str | None:
    """In which order of dimensions a tensor is contiguous."""
    if t.is_contiguous():
        return "channels first"
    return "channels last" if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) else None


def _fill(count: int, block: int = BLOCK) -> int:
    return -(-count // block) * block


def _blocked(t: Tensor, block: int = BLOCK) -> int:
    """Bytes of [N, C, ...] with the channels filled up to whole blocks."""
    return t.shape[0] * _fill(t.shape[1], block) * prod(t.shape[2:]) * t.element_size()


def _depthwise(w: Tensor, groups: int) -> bool:
    """Whether every channel has filters of its own: they are what is blocked then."""
    return groups > 1 and groups == w.shape[0] and w.shape[1] == 1


def _blocked_weight(w: Tensor, groups: int, block: int = BLOCK) -> int:
    if _depthwise(w, groups):
        return _fill(groups) * prod(w.shape[2:]) * w.element_size()
    channels = groups * _fill(w.shape[0] // groups, block) * _fill(w.shape[1], block)
    return channels * prod(w.shape[2:]) * w.element_size()


def _gathered(x: Tensor, w: Tensor, out: Tensor, geometry: list[Any]) -> int:
    """A strided 1x1 filter gathers the pixels of one image that it reads."""
    strided = prod(w.shape[2:]) == 1 and max(geometry[0]) > 1
    return prod(out.shape[2:]) * _fill(x.shape[1]) * x.element_size() + 128 if strided else 0


def _onednn_forward(x: Tensor, w: Tensor, out: Tensor, geometry: list[Any], groups: int) -> int:
    as_is = groups == 1 and x.shape[1] < BLOCK and prod(w.shape[2:]) > 1
    read = 0 if as_is else _blocked(x)
    made = _blocked(out)
    return _gathered(x, w, out, geometry) + made + max(read + _blocked_weight(w, groups), out.nbytes)


def _onednn_backward(x: Tensor, w: Tensor, grad: Tensor, geometry: list[Any], groups: int, mask: list[bool]) -> int:
    weight, kept = _blocked_weight(w, groups), x.nbytes if mask[0] else 0
    to_x = to_w = 0
    if mask[0]:
        strided = max(geometry[0]) > 1 and not _depthwise(w, groups)
        made = x.nbytes if strided else _blocked(x)
        read = grad.nbytes + STRIDED if strided else _blocked(grad)
        to_x = max(read + weight + made, (1 + strided) * made + kept)
    if mask[1]:
        to_w = kept + _to_weight(x, w, grad, geometry, groups)
    return max(to_x, to_w)


def _to_weight(x: Tensor, w: Tensor, grad: Tensor, geometry: list[Any], groups: int) -> int:
    """What the weight's gradient takes: both operands in blocks, and the result in blocks and copied out."""
    filters, inward = prod(w.shape[2:]) > 1 and groups == 1, w.shape[1]
    if filters and inward <= PLAIN:
        return _blocked(grad) + _fill(w.shape[0]) * prod(w.shape[1:]) * w.element_size()
    block = HALF if filters and inward < BLOCK else BLOCK
    weight = _blocked_weight(w, groups, block)
    if _depthwise(w, groups) and any(a < b for a, b in zip(x.shape[2:], w.shape[2:], strict=True)):
        return 5 * weight + 400  # images smaller than the filters are read as they are
    return weight + max(_blocked(x, block) + _blocked(grad, block) + _gathered(x, w, grad, geometry), w.nbytes)


def _columns(x: Tensor, w: Tensor, out: Tensor, groups: int) -> int:
    """Bytes of the unfolded columns of one group, and of that group's images and results where there are several."""
    if groups == 1 and prod(w.shape[2:]) == 1 and x.shape[2:] == out.shape[2:]:
        return 0  # the images are their own columns
    columns = x.shape[0] * prod(w.shape[1:]) * prod(out.shape[2:]) * x.element_size()
    return columns + (x.nbytes + out.nbytes) // groups if groups > 1 else columns
