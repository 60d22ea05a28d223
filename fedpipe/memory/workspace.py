"""What operations allocate for themselves while they run, by the allocator's records: on a CPU, but for cuBLASLt.

Convolutions of float32 are oneDNN's: the operands are copied into blocks of channels, the result is made in blocks and
copied out; the gradient of the input is made first and held while that of the weight is made. Blocks have 16 channels
with AVX-512 (8 for the weight's gradient of narrow layers), 8 with AVX2. Where images or weights lie channels last,
operands that do not are copied so that they do, and only weights are blocked. Where torch takes its own convolution
(float64, single images, few 1x1 filters) it unfolds the columns of the whole batch into one matrix. The backward of a
batch norm makes the gradient of its input twice.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from fedpipe.memory.blocks import (
    BLOCK,
    HALF,
    beyond,
    blocked,
    blocked_weight,
    columns,
    depthwise,
    fill,
    gathered,
    grouped_backward,
)

aten = torch.ops.aten
STRIDED = 53_272  # bytes of scratch seen at most for the gradient of a strided convolution's input
SCRATCH, PAGE = 8_344, 4_096  # bytes a channels-last convolution takes, and those in which it counts what is larger
LT = 2**20  # bytes cuBLASLt takes for a product with a bias, and gives back (seen on an H200, torch 2.11)
PLAIN = 3  # channels up to which the weight's gradient takes images, and its own, as they are
ORDERS = torch.contiguous_format, torch.channels_last
POOLS = {
    *(aten.max_pool2d_with_indices_backward.default, aten.avg_pool2d_backward.default),
    aten._adaptive_avg_pool2d_backward.default,
}


def workspace(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """Peak bytes, results included, that operation `func` allocates while it runs; 0 where only its results count."""
    if func is aten.convolution.default and args[0].device.type == "cpu":
        return _forward(args, out)
    if func is aten.convolution_backward.default and args[0].device.type == "cpu":
        return _backward(args)
    if func is aten.addmm.default and args[1].device.type == "cuda":
        return out.nbytes + LT
    if func in POOLS:
        return _pool_backward(args, out)
    if func is aten.native_batch_norm_backward.default:
        return _norm_backward(args[0], args[1], args[-1], out)
    return 0


def _forward(args: tuple[Any, ...], out: Tensor) -> int:
    x, w, bias, *geometry, groups = args
    onednn, order = _backend(x, w, bias, geometry, groups)
    copies = _copies(order, x, w)
    if onednn and order == torch.channels_last:
        spread = BLOCK == 16 and x.shape[1] == 1 and prod(w.shape[2:]) > 1  # AVX-512 spreads images of one channel
        return copies + out.nbytes + _reordered(w, out, groups) + (13 * PAGE if spread else 0)
    if onednn:
        return _onednn_forward(x, w, out, geometry, groups)
    return copies + _own(out.nbytes, x.nbytes, columns(x, w, out, groups), groups)


def _backward(args: tuple[Any, ...]) -> int:
    grad, x, w, _, *geometry, groups, mask = args
    onednn, order = _backend(x, w, None, geometry, groups)
    copies, of_grad = _copies(order, x, w), _copies(order, grad)
    if onednn and order == torch.channels_last:
        return copies + of_grad + _last_backward(x, w, grad, geometry, groups, mask)
    if onednn:
        return copies + of_grad + _onednn_backward(x, w, grad, geometry, groups, mask)
    made, unfolded = (x.nbytes if mask[0] else 0) + (w.nbytes if mask[1] else 0), 0
    if mask[1]:
        unfolded = columns(x, w, grad, groups)
    if groups > 1:  # copied group by group, twice where it lies otherwise
        return copies + _own(made, x.nbytes + grad.nbytes + of_grad, unfolded, groups)
    return copies + of_grad + made + unfolded


def _backend(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Any, groups: int) -> tuple[bool, torch.memory_format]:
    """Whether oneDNN convolves, and the order of dimensions in which operands and results are to lie."""
    found = torch._C._select_conv_backend(x, w, bias, *geometry, groups)
    return found.name.startswith("Mkldnn"), torch._C._conv_determine_backend_memory_format(x, w, found)


def _copies(order: torch.memory_format, *operands: Tensor) -> int:
    return sum(t.nbytes for t in operands if not t.is_contiguous(memory_format=order))


def _own(made: int, operands: int, columns: int, groups: int) -> int:
    """Of torch's own convolution: one group's operands are copied at a time, and all groups' results joined at last."""
    return made + (columns if groups == 1 else max(made, columns + operands // groups))


def _reordered(w: Tensor, made: Tensor, groups: int, threes: bool = True) -> int:
    """Bytes of weights, and what else a channels-last convolution that makes `made` takes to read them."""
    if groups > 1:
        return blocked_weight(w, groups) + (0 if depthwise(w, groups) else SCRATCH)
    channels = _wide(made.shape[1], w.shape[3] == 1, threes and made.shape[3] > 8)
    return w.nbytes * channels // made.shape[1] + SCRATCH


def _wide(count: int, pointwise: bool, threes: bool) -> int:
    """Channels in blocks of as many registers as oneDNN reckons to be best: where several, then two, three or four."""
    if count <= BLOCK:
        return BLOCK
    two, three, four = (fill(count, n * BLOCK) for n in (2, 3, 4))
    if BLOCK == HALF:  # the most that it may be
        return three if three == fill(count) <= 12 * BLOCK else two if count <= 4 * BLOCK else max(three, four)
    if pointwise:
        return three if 20 * three <= 21 * count else two
    return three if threes and three == fill(count) else two


def _last_backward(x: Tensor, w: Tensor, grad: Tensor, geometry: list[Any], groups: int, mask: list[bool]) -> int:
    """Channels last: the gradient of the weights is made in blocks, copied out, and copied again."""
    kept, to_x, to_w = x.nbytes if mask[0] else 0, 0, 0
    strided = max(geometry[0]) > 1
    if mask[0]:
        padded = _padded(x, w, grad, geometry) if strided and not depthwise(w, groups) else 0
        to_x = kept + _reordered(w, x, groups, not strided) + padded
    if mask[1]:
        if BLOCK == HALF and beyond(x, w):  # unfolded
            return max(to_x, kept + 5 * w.nbytes + columns(x, w, grad, groups) // len(x))
        read = gathered(x, w, grad, geometry) if groups == 1 else 0
        to_w = kept + _made_weight(x, w, geometry, groups) + max(2 * w.nbytes, read)
    return max(to_x, to_w)


def _padded(x: Tensor, w: Tensor, grad: Tensor, geometry: list[Any]) -> int:
    """For a strided convolution's input an image of the incoming gradient is padded; more where the stride leaves a
    rest."""
    image = prod(grad.shape[1:3]) * (grad.shape[3] + w.shape[3] - 1) * grad.element_size()
    rest = any(side % stride for side, stride in zip(x.shape[2:], geometry[0], strict=True))
    return 3 * PAGE + fill(image, 4 * PAGE) + (5 * PAGE if rest else 0)


def _made_weight(x: Tensor, w: Tensor, geometry: list[Any], groups: int) -> int:
    side, inward, stride = w.shape[3], w.shape[1], max(geometry[0])
    odd = side > 3 or stride > min(2, side) or min(x.shape[2:]) < side + stride - 1
    if depthwise(w, groups) and odd:  # taken for groups of many channels
        return groups * BLOCK**2 * prod(w.shape[2:]) * w.element_size()
    if groups == 1 and prod(w.shape[2:]) > 1 and inward < BLOCK and (BLOCK == 16 or inward == PLAIN):
        return fill(w.shape[0]) * prod(w.shape[1:]) * w.element_size()
    return blocked_weight(w, groups)


def _norm_backward(grad: Tensor, x: Tensor, mask: list[bool], out: Any) -> int:
    """The gradient of the input is allocated, then allocated anew where both are contiguous in the same order."""
    if x.device.type != "cpu" or not mask[0] or not (_order(grad) and _order(grad) == _order(x)):
        return 0
    return x.nbytes + sum(t.nbytes for t in out if t is not None)


def _pool_backward(args: tuple[Any, ...], out: Tensor) -> int:
    """Where gradient and input lie in different orders the result is made in both, and the indices are copied."""
    grad, x, *rest = args
    if x.device.type != "cpu" or x.dim() != 4 or any(_copies(o, grad, x) == 0 for o in ORDERS):
        return 0
    return 2 * out.nbytes + sum(t.nbytes for t in rest if isinstance(t, Tensor))


def _order(t: Tensor) -> str | None:
    """In which order of dimensions a tensor is contiguous."""
    if t.is_contiguous():
        return "channels first"
    return "channels last" if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) else None


def _onednn_forward(x: Tensor, w: Tensor, out: Tensor, geometry: list[Any], groups: int) -> int:
    as_is = groups == 1 and x.shape[1] < BLOCK and prod(w.shape[2:]) > 1
    read = 0 if as_is else blocked(x)
    made = blocked(out)
    return gathered(x, w, out, geometry) + made + max(read + blocked_weight(w, groups), out.nbytes)


def _onednn_backward(x: Tensor, w: Tensor, grad: Tensor, geometry: list[Any], groups: int, mask: list[bool]) -> int:
    if groups > 1 and not depthwise(w, groups):
        return grouped_backward(x, w, grad, max(geometry[0]) > 1, groups, mask)
    weight, kept = blocked_weight(w, groups), x.nbytes if mask[0] else 0
    to_x = to_w = 0
    if mask[0]:
        strided = max(geometry[0]) > 1 and not depthwise(w, groups)
        made = x.nbytes if strided else blocked(x)
        read = grad.nbytes + STRIDED if strided else blocked(grad)
        to_x = max(read + weight + made, (1 + strided) * made + kept)
    if mask[1]:
        to_w = kept + _to_weight(x, w, grad, geometry, groups)
    return max(to_x, to_w)


def _to_weight(x: Tensor, w: Tensor, grad: Tensor, geometry: list[Any], groups: int) -> int:
    """What the weight's gradient takes: both operands in blocks, and the result in blocks and copied out."""
    filters, inward = prod(w.shape[2:]) > 1 and groups == 1, w.shape[1]
    if filters and inward <= PLAIN:
        return blocked(grad) + fill(w.shape[0]) * prod(w.shape[1:]) * w.element_size()
    block = HALF if filters and inward < BLOCK else BLOCK
    weight = blocked_weight(w, groups, block)
    if depthwise(w, groups) and beyond(x, w):
        return 5 * weight + 400  # images smaller than the filters are read as they are
    return weight + max(blocked(x, block) + blocked(grad, block) + gathered(x, w, grad, geometry), w.nbytes)
