"""One unit of a chain, trained alone under fake tensors: what it adds to a peak, and the work it does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedpipe.memory.predict import Trace, tensor_bytes
from fedpipe.tracing import flop_registry
from fedpipe.types import Tensors

Run = Callable[[Tensors, Tensor], Tensor]  # (parameters and buffers, x) -> result
BALANCE = 16  # floating-point operations in the time one byte is moved: processors and GPUs have 10 to 20 in float32


@dataclass(frozen=True)
class Sample:
    """What a unit's input is like. own: it is memory that an operation has made, and no view."""

    shape: tuple[int, ...]  # [batch, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    own: bool = True

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def ordered(t: Tensor, order: torch.memory_format) -> Tensor:
    """A tensor, with its dimensions in this order if they are a batch of maps or filters."""
    return t.contiguous(memory_format=order) if t.dim() == 4 else t


@dataclass(frozen=True)
class Pass:
    """Bytes of a unit's training step; rises are above all that is alive before.

    saved      kept from its forward to its backward besides its input and output, which are kept if `input`, `output`
    forward    rise of its forward, its input included
    backward   rise of its backward: what it saved and the incoming gradient included, a kept input not
    gradients  of its parameters
    work       bytes read and written, and operations in bytes, of both
    """

    saved: int
    input: bool
    output: bool
    forward: int
    backward: int
    gradients: int
    work: float


class _Rest(torch.autograd.Function):
    """Stands for all that follows: saves nothing, and its gradient comes into being when it is asked for."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.like = y.shape, y.stride(), y.dtype
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        shape, stride, dtype = ctx.like
        return torch.empty_strided(shape, stride, dtype=dtype, device=grad[0].device)


class Work(TorchDispatchMode):
    """Adds up what operations read, write and compute; views do none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.done += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        if count := flop_registry.get(func._overloadpacket):
            self.done += count(*args, **(kwargs or {}), out_val=out) / BALANCE
        return out


def trained(run: Run, at: Tensors, live: Sequence[str], x: Sample, deep: bool, loss: bool = False) -> Pass:
    """Trace run(at, x) and its backward by autograd, x like the sample. deep: x has a gradient; loss: the result is the
    loss."""
    with Trace(x.device) as trace, Work() as work:
        held = {n: t.requires_grad_(n in live) for n, t in trace.fake(at).items()}
        seed = torch.empty(1, dtype=x.dtype, device=x.device).requires_grad_(deep)
        before, work.done = trace.now, 0.0
        z = x.made().add_(seed)  # no leaf: a leaf would be kept by the edge that its gradient is asked by
        wanted: list[Any] = [*([get_gradient_edge(z)] if deep else []), *(held[n] for n in live)]
        with trace.span({}) as forward:
            y = run(held, z)
        sizes, refs = [tensor_bytes([t]) for t in (z, y)], [StorageWeakRef(t.untyped_storage()) for t in (z, y)]
        end = y if loss else _Rest.apply(y)
        del z, y
        kept = [not refs[0].expired(), not loss and not refs[1].expired()]
        own = sum(s for s, k in zip(sizes, kept, strict=True) if k)
        saved = trace.now - before - own - tensor_bytes([end])
        found: Sequence[Tensor | None] = ()
        with trace.span({}) as backward:
            if wanted and end.requires_grad:
                found = torch.autograd.grad(end, wanted, allow_unused=True)
        gradients = tensor_bytes([g for g in found[deep:] if g is not None])
    rise = backward.bytes + saved + kept[1] * sizes[1]
    return Pass(saved, kept[0], kept[1], sizes[0] + forward.bytes, rise, gradients, work.done)


@dataclass(frozen=True)
class Still:
    """A unit that only runs: the rise, its input included; the work; what its result is like."""

    rise: int
    work: float
    result: Sample


def still(run: Run, at: Tensors, x: Sample) -> Still:
    """Trace run(at, x) without a backward, x like the sample."""
    with Trace(x.device) as trace, Work() as work:
        held, work.done, given = trace.fake(at), 0.0, [x.made()]
        size = tensor_bytes(given)
        with trace.span({}) as span:
            y = run(held, given.pop())
        return Still(size + span.bytes, work.done, replace(x, shape=tuple(y.shape), stride=y.stride(), dtype=y.dtype))


def updated(shapes: Sequence[Tensor], make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> tuple[int, int]:
    """Bytes an optimizer keeps for these tensors, and the rise of its second step."""
    with Trace(shapes[0].device.type) as trace:
        leaves = [t.requires_grad_() for t in trace.fake({str(i): t for i, t in enumerate(shapes)}).values()]
        opt = make(leaves)
        for leaf in leaves:
            leaf.grad = torch.empty_like(leaf)
        before = trace.now
        opt.step()
        state = trace.now - before
        with trace.span({}) as span:
            opt.step()
        return state, span.bytes


_COMMON = frozenset(vars(nn.Module()))
_PLAIN = (int, float, str, tuple, type(None))


def build(module: nn.Module) -> tuple[Any, ...]:
    """What two modules share that do the same to the same shapes: types, plain settings, shapes of their tensors."""
    parts = []
    for name, m in module.named_modules():
        own = {k: v for k, v in vars(m).items() if k not in _COMMON}
        plain = tuple((k, repr(v) if isinstance(v, _PLAIN) else id(v)) for k, v in own.items())
        tensors = [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]
        parts.append((name, type(m), m.training, plain, tuple((n, t.shape, t.dtype) for n, t in tensors)))
    return tuple(parts)
