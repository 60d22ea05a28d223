"""The peak memory of code, from running it on fake tensors: shapes and lifetimes are real, nothing is computed or held.

Counted are the storages of all tensors alive, each once, from its making until its last reference dies, and what
convolutions and norms allocate for themselves while they run (`workspace`). Not counted: temporaries inside other
operations, libraries that do not use torch's allocator, Python's own objects. On CUDA sizes are rounded up to the
allocator's 512 bytes, and workspaces of cuDNN are not counted.

How far predictions are from the allocator's records: benchmarks/memory.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fedpipe.memory.live import Live, storage_bytes
from fedpipe.memory.parts import KINDS, Parts, kind_of, parts
from fedpipe.tracing import fake_mode
from fedpipe.types import Tensors


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors, real or fake."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s._cdata: storage_bytes(s) for s in storages}.values())


@dataclass
class Span:
    """A block of code: the bytes of its peak, what is held before it and the largest rise above that, and what that
    is made of. Final at its end."""

    bytes: int
    parts: Parts = Parts()


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
        self._live = Live()
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
        self._stack.enter_context(fake_mode())
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
