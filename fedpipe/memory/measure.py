"""The peak memory of code as torch's allocator saw it: the profiler's records on a CPU, its own count on CUDA."""

import gc
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fedpipe.memory.predict import tensor_bytes

BESIDE = ("resident", "reserved", "device")


class Peak:
    """Measures the code in its block: `bytes` is that of the tensors `held` before it, plus the largest rise inside.

    with Peak(at.values()) as peak:
        train(at)
    peak.bytes, peak.beside

    `beside` holds what else there is to know in bytes, None where there is no such thing: `resident`, by how much the
    process's resident set grew at most; on CUDA `reserved`, the most the allocator had taken from the device, and
    `device`, what of the device is in use at the end, by whatever.

    `bytes` sees what torch's allocator hands out, as it was asked for. It does not see memory that libraries take by
    themselves (packed operands of matrix products, threads' stacks), numpy's arrays or Python's objects, nor what is
    reserved and not handed out. On a CPU every operation is recorded: a step of a tiny model takes about three times
    as long, and the records grow with the block, so measure a phase, not a study. One block at a time: profilers do
    not nest.
    """

    def __init__(self, held: Iterable[Tensor] = (), device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0
        self.beside: dict[str, int | None] = dict.fromkeys(BESIDE)
        self._held = tensor_bytes(held)
        self._start = 0
        self._resident: int | None = None
        self._profile: Any = None

    def __enter__(self) -> Self:
        gc.freeze()  # what is garbage now may be known to the allocator's records, and is none of the block's
        self._resident = _reset_resident()
        if self.device.type == "cuda":
            _warm(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            # read when the first profiler of a process starts: from 6 on it prints no line at every start and stop
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            self._profile = torch.autograd.profiler.profile(profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            rise = torch.cuda.max_memory_allocated(self.device) - self._start
            free, total = torch.cuda.mem_get_info(self.device)
            self.beside |= {"reserved": torch.cuda.max_memory_reserved(self.device), "device": total - free}
        else:
            self._profile.__exit__(*error)
            rise = _largest_rise(self._profile)
            self._profile = None
        gc.unfreeze()
        self.bytes = self._held + rise
        most = _status("VmHWM")
        if self._resident is not None and most is not None:
            self.beside["resident"] = max(0, most - self._resident)


def _reset_resident() -> int | None:
    """Bytes resident now, from which the highest is counted anew; None where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


@cache
def _warm(device: torch.device) -> None:
    """Have the matrix library take the workspace it keeps, forward and backward (autograd's thread has one of its own):
    once a process, and no client's."""
    x = torch.ones(2, 2, device=device, requires_grad=True)
    with torch.enable_grad():
        (x @ x).sum().backward()
    torch.cuda.synchronize(device)


def _largest_rise(profile: Any) -> int:
    """Of the running sum of allocations and frees, in the order of time."""
    records = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for e in sorted(records, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak
