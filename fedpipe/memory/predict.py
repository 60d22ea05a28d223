"""The peak memory of code, from running it on fake tensors: shapes and lifetimes are real, nothing is computed or held.

Counted are the storages of all tensors alive, each once, from its making until its last reference dies, and what
convolutions and norms allocate for themselves while they run (`workspace`). Not counted: temporaries inside other
operations, libraries that do not use torch's allocator, Python's own objects. On CUDA sizes are rounded up to the
allocator's 512 bytes, and workspaces of cuDNN are not counted.

How far predictions are from the allocator's records: benchmarks/memory.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fedpipe.errors import FedpipeError
from fedpipe.memory.parts import KINDS, Parts, Record, Stage, kind_of, parts
from fedpipe.memory.workspace import workspace
from fedpipe.types import Tensors


def _bytes(storage: torch.UntypedStorage) -> int:
    size = storage.nbytes()
    return -(-size // 512) * 512 if storage.device.type == "cuda" else size


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors, real or fake."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s._cdata: _bytes(s) for s in storages}.values())


@dataclass
class Span:
    """A block of code: the bytes of its peak, what is held before it and the largest rise above that, and what that
    is made of. Final at its end."""

    bytes: int
    parts: Parts = Parts()


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make, takes them away when they die, and remembers the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.moment = 0
        self.tick = 0  # changes so far
        self.records: list[Record] = []
        self.turns: list[tuple[int, Stage]] = [(0, "forward")]
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], Record]] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, _bytes(storage)
        if key not in self._alive:
            if torch.is_grad_enabled() and not _in_backward():
                self.turn("forward")
            self.tick += 1
            record = Record(size, self.tick, self.turns[-1][1])
            self.records.append(record)
            self._alive[key] = (weakref.ref(storage, lambda _: self._drop(key)), record)
            self.now += size
            self.rise(self.now)

    def rise(self, to: int) -> None:
        if to > self.peak:
            self.peak, self.moment = to, self.tick

    def turn(self, stage: Stage) -> None:
        if self.turns[-1][1] != stage:
            self.tick += 1
            self.turns.append((self.tick, stage))

    def of(self, tensor: Tensor) -> Record:
        return self._alive[tensor.untyped_storage()._cdata][1]

    def _drop(self, key: int) -> None:
        record = self._alive.pop(key)[1]
        self.tick += 1
        record.died = self.tick
        self.now -= record.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # what half of all calls ask
        if self.turns[-1][1] == "update" and func in _IN_PLACE and args[0].dim() and not _in_backward():
            return args[0]  # of a scalar, as a count of steps is, the value is known and must change
        before = self.now
        if _in_backward():
            self.turn("backward")
        elif self.turns[-1][1] == "backward":
            self.turn("update")
        try:
            out = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if isinstance(args[0], FakeTensor):
                return 1  # so that a loop that asks whether its loss is finite goes on
            with _disable_current_modes():
                return func(*args)
        except DynamicOutputShapeException:
            raise FedpipeError(
                f"memory: {func} makes a tensor whose size depends on values, so no peak can be predicted"
            ) from None
        self.rise(before + workspace(func, args, out))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.add(t)
        return out


aten = torch.ops.aten
# An optimizer's operations that make nothing: most of what a trace would run.
_IN_PLACE = {
    *(aten.add_.Tensor, aten.mul_.Tensor, aten.sub_.Tensor, aten.div_.Tensor, aten.copy_.default, aten.zero_.default),
    *(aten.addcmul_.default, aten.addcdiv_.default, aten.lerp_.Scalar, aten.sqrt_.default),
}


def _in_backward() -> bool:
    return torch._C._current_autograd_node() is not None


class Trace:
    """A context in which every operation runs on fake tensors and the bytes alive are counted.

    with Trace() as trace:
        at = trace.fake(tensors)                       # same shapes, dtypes and strides; count from here on
        with trace.span(at.values()) as phase:         # peak of a part: held before + largest rise
            train(at, batch=torch.empty(32, 3, 16, 16))
    trace.peak, phase.bytes

    Scalars read from fake tensors (`item`, truth) are 1. Real tensors used inside are taken as fake ones and not
    counted. Raises FedpipeError where the size of a tensor depends on values.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._live = _Live()
        self._stack = ExitStack()

    @property
    def peak(self) -> int:
        """Largest number of bytes alive so far."""
        return self._live.peak

    @property
    def now(self) -> int:
        """Bytes alive now."""
        return self._live.now

    def __enter__(self) -> Self:
        # cycles are not collected inside: when that happens depends on what the process did before
        if gc.isenabled():
            gc.disable()
            self._stack.callback(gc.enable)
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._stack.enter_context(self._live)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def fake(self, tensors: Tensors) -> Tensors:
        """Fake tensors of the shapes, strides and dtypes of real (or meta) ones; views become tensors of their own."""
        return {
            n: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device) for n, t in tensors.items()
        }

    @contextmanager
    def span(self, held: Tensors) -> Iterator[Span]:
        """The peak of the block: bytes of `held`, tensors that exist before it, and the largest rise inside it.

        Of `held`, `model/*` are parameters, `optimizer/*` its state; other names are a method's state.
        """
        live, span = self._live, Span(tensor_bytes(held.values()))
        outer, start, first = (live.peak, live.moment), live.now, len(live.records)
        live.peak, live.moment = start, live.tick
        try:
            yield span
        finally:
            span.bytes += live.peak - start
            span.parts = self._parts(held, first, span.bytes)
            live.peak, live.moment = max(outer, (live.peak, live.moment))

    def _parts(self, held: Tensors, first: int, total: int) -> Parts:
        live, sizes = self._live, dict.fromkeys(KINDS, 0)
        for name, one in {id(live.of(t)): (n, live.of(t)) for n, t in held.items()}.values():
            sizes[kind_of(name)] += one.bytes
        for kind, size in parts(live.records[first:], live.turns, live.moment).items():
            sizes[kind] += size
        sizes["workspace"] = total - sum(sizes.values())
        return Parts(**sizes)


def traced_peak(fn: Callable[[Tensors], Any], tensors: Tensors) -> int:
    """Peak bytes of fn(tensors), the tensors included; fn gets fake ones and makes its batches by `torch.empty`."""
    with Trace() as trace:
        fn(trace.fake(tensors))
    return trace.peak
