"""The masked local step, in place: x <- m (x - lr (g - h + mu (x - anchor))), with SGD's momentum and weight decay.

In this order, which is torch.optim.SGD's: g' = g - h + mu (x - anchor); d = g' + weight_decay x; with momentum
buffer <- momentum buffer + d (the first step: d) and d = buffer; x <- x - lr d; entries whose bit is 0 become 0.
"""

import torch
from torch import Tensor

from fedpipe.kernels.common import Backend, chosen, wanted, words
from fedpipe.kernels.step import reference
from fedpipe.kernels.step.reference import Numbers

EXACT = (torch.float32, torch.float64)


def step_(
    x: Tensor, g: Tensor, lr: float, *, mask: Tensor | None = None, variate: Tensor | None = None,
    anchor: Tensor | None = None, mu: float = 0.0, momentum: float = 0.0, weight_decay: float = 0.0,
    buffer: Tensor | None = None, first: bool = False, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """One step on x [n] or [clients, n], in place; returns x.

    g, variate: of x's shape, float32 or bfloat16 (float64 where x is). anchor, buffer: of x's shape and type. mask:
    int32 words [words(n)], for all clients, or [clients, words(n)]. buffer: the momentum buffer, written in place;
    first: it holds nothing yet. float64 runs by the reference on every device. Raises ValueError, before anything is
    written, for wrong types, shapes and devices, and for a buffer without momentum or momentum without a buffer.
    """
    wanted("x", x, EXACT)
    for name, t in {"g": g, "variate": variate, "anchor": anchor, "buffer": buffer}.items():
        if t is not None:
            rounded = (torch.bfloat16,) if name in ("g", "variate") else ()
            wanted(name, t, (x.dtype, *rounded), tuple(x.shape), x)
    if mask is not None:
        lead = x.shape[:-1] if mask.dim() > 1 else ()
        wanted("mask", mask, (torch.int32,), (*lead, words(x.shape[-1])), x)
    if (buffer is None) != (momentum == 0):
        given = "none" if buffer is None else "one"
        raise ValueError(f"buffer: {given} with momentum {momentum}; wanted both or neither")
    if mu and anchor is None:
        raise ValueError(f"anchor: none with mu {mu}; wanted a tensor")
    numbers = Numbers(lr, mu, momentum, weight_decay, first)
    _code(backend, x).step_(x, g, mask, variate, anchor if mu else None, buffer, numbers)
    return x


def bytes_moved(n: int, mask: bool = True, variate: bool = True, anchor: bool = False, momentum: bool = False,
                itemsize: int = 4) -> float:  # fmt: skip
    """Bytes one step must read and write for n entries of a float32 x; itemsize: bytes of an entry of g and variate."""
    return n * (8 + itemsize + mask / 8 + itemsize * variate + 4 * anchor + 8 * momentum)


def _code(backend: Backend, x: Tensor):  # type: ignore[no-untyped-def]
    if not chosen(backend, x) or x.dtype == torch.float64:
        return reference
    from fedpipe.kernels.step import kernel

    return kernel
