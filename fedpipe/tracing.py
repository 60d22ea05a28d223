"""What fake tensors take of torch, without Triton where nothing runs by it.

torch imports Triton where it finds it, and with it a compiler: 70 MiB in a process that trains on a CPU.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def spared() -> Iterator[None]:
    """Imports of this block find no Triton, unless it is there already, torch is built for a GPU or the kernels run by
    Triton's interpreter."""
    gpu = any(getattr(torch.version, kind, None) for kind in ("cuda", "hip", "xpu"))
    if "triton" in sys.modules or gpu or os.environ.get("TRITON_INTERPRET") == "1":
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["triton"]


def fake_mode() -> FakeTensorMode:
    """A mode of fake tensors beside real ones; the first imports torch._dynamo."""
    with spared():
        return FakeTensorMode(allow_non_fake_inputs=True)


def load() -> None:
    """Import torch._dynamo, as making an optimizer does."""
    with spared():
        import_module("torch._dynamo")


with spared():
    from torch.utils.flop_counter import flop_registry as flop_registry
