"""The storages alive while fake tensors are computed with: each counted once, from its making to its last reference."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fedpipe.errors import FedpipeError
from fedpipe.loop.straight import Stage as CapturedStage
from fedpipe.memory.parts import Record, Stage
from fedpipe.memory.workspace import workspace


def storage_bytes(storage: torch.UntypedStorage) -> int:
    size = storage.nbytes()
    return -(-size // 512) * 512 if storage.device.type == "cuda" else size


class Live(TorchDispatchMode):
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
        key, size = storage._cdata, storage_bytes(storage)
        if key not in self._alive:
            if (torch.is_grad_enabled() and not _in_backward()) or CapturedStage.now == "forward":
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
    return torch._C._current_autograd_node() is not None or CapturedStage.now == "backward"
