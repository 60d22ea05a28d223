"""What every kernel shares: which code runs where, checks of what came in, masks as 32-bit words, tiles.

A mask of n entries is `words(n)` int32 words; bit i of word w stands for entry 32 w + i, and bits past n are 0.
Buffers may have a leading client axis: [clients, n], with masks [clients, words(n)].
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Backend = Literal["auto", "reference", "triton"]
OPS = ("step", "topk", "bits", "sparse", "aggregate", "norm")
WORD = 32


def words(n: int) -> int:
    """32-bit words that hold n bits."""
    return -(-n // WORD)


def chosen(backend: Backend, tensor: "Tensor") -> bool:
    """Whether Triton's kernel runs: on CUDA unless the reference is asked for; elsewhere only when asked for, under
    Triton's interpreter (TRITON_INTERPRET=1)."""
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend: {backend!r}; wanted auto, reference or triton")
    if backend == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend: triton for a tensor on {tensor.device}; wanted one on cuda, or TRITON_INTERPRET=1")
    return backend == "triton" or (backend == "auto" and tensor.is_cuda)


def wanted(name: str, tensor: "Tensor", dtypes: tuple[Any, ...], shape: tuple[int, ...] | None = None,
           like: "Tensor | None" = None) -> None:  # fmt: skip
    """Raise ValueError unless a tensor has one of the types, the shape, and is contiguous on the device of `like`."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype}; wanted {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; wanted {shape}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device}; wanted {like.device}, where the others are")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: not contiguous (strides {tensor.stride()}); wanted a contiguous tensor")


def later(word: "Tensor") -> Callable[[], int]:
    """What a word of the device holds now; asked for later, so that more can be launched before it is waited for."""
    import torch

    if not word.is_cuda:
        return lambda: int(word)
    copy, copied = torch.empty(word.shape, dtype=word.dtype, pin_memory=True), torch.cuda.Event()
    copy.copy_(word, non_blocking=True)
    copied.record()

    def value() -> int:
        copied.synchronize()
        return int(copy)

    return value


@dataclass(frozen=True)
class Variant:
    """One compilation of a Triton kernel, for a test without a GPU: argument types by name, constants, warps.

    aligned: integer arguments that are multiples of 16. streaming: it only reads and writes whole tiles, so few
    registers, no spills and 128-bit loads are wanted of it.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    aligned: tuple[str, ...] = ()
    streaming: bool = True
    options: dict[str, Any] = field(default_factory=dict)  # of the compiler
