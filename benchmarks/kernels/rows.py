"""One row of the kernels' table: ours and every baseline timed in turn, beside a copy of as many entries.

Time is judged in units of that copy, taken in the same process and the same turns: a card's own speed drops out.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = int(os.environ.get("FEDPIPE_BENCH_N", 2**28 if DEVICE == "cuda" else 2**22))  # entries of the large rows
SMALL = 300_000  # entries of a small model, where launches and not bytes take the time
BANDWIDTH = 3.0e12 if DEVICE == "cuda" else 1.0e10  # bytes/s at which the ideal time is stated: H100, one CPU core
TURNS = 20 if DEVICE == "cuda" else 5

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """`make(n)` gives (ours, {baseline: call}); `moved(n)` the bytes ours must read and write; `compiled` names the
    baselines that torch.compile makes, which are left out on a CPU (a compiler is needed, and half a minute each)."""

    name: str
    make: Callable[[int], tuple[Call, dict[str, Call]]]
    moved: Callable[[int], float]
    n: int = N
    compiled: tuple[str, ...] = ("compile",)
    limits: dict[str, float] = field(default_factory=dict)  # wanted on a GPU: {"copies": at most, "eager": at least x}


def compiled(function: Callable[..., Any], *arguments: Any) -> Call:
    """A call of what torch.compile makes of a function, made at the first call."""
    made: list[Any] = []

    def call() -> Any:
        if not made:
            made.append(torch.compile(function, dynamic=False))
        return made[0](*arguments)

    return call


def unpacked(words: torch.Tensor, n: int) -> torch.Tensor:
    """The bool mask of words in the shortest expression: what a baseline with our format of masks begins with."""
    return ((words[:, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1).flatten()[:n] != 0


def once(call: Call) -> tuple[float, float]:
    """Seconds of one call on the device and as its caller waits for it.

    On a GPU the first is taken by events, with a cold L2 and work ahead, so that launching is over when the device
    comes to it: what a call costs in a stream that is never empty. The second begins with an idle device.
    """
    if DEVICE == "cpu":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin,) * 2
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    waited = time.perf_counter() - begin
    torch.empty(64 * 2**20, dtype=torch.int32, device=DEVICE).zero_()
    torch.cuda._sleep(4_000_000)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000, waited


def run(row: Row, benchmark: Any) -> None:
    """Time a row; its figures go into the benchmark's JSON (`extra_info`), and are printed when all rows are done."""
    ours, baselines = row.make(row.n)
    if DEVICE == "cpu":
        baselines = {k: c for k, c in baselines.items() if k not in row.compiled}
    source = torch.rand(row.n, device=DEVICE)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source), "ours": ours, **baselines}
    for call in calls.values():  # compiled, tuned, allocated
        for _ in range(3):
            call()
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            seen[name].append(once(call))
    kind = 1 if row.n == SMALL else 0  # of a small row what counts is how long its caller waits
    median = {name: statistics.median(s[kind] for s in times) for name, times in seen.items()}
    moved = row.moved(row.n)
    benchmark.extra_info.update(
        row=row.name, n=row.n, bytes_per_entry=moved / row.n, ideal_ms=1e3 * moved / BANDWIDTH,
        ours_ms=1e3 * median["ours"], gb_per_s=moved / median["ours"] / 1e9, copies=median["ours"] / median["copy"],
        ratios={k: median[k] / median["ours"] for k in baselines}, baselines_ms={k: 1e3 * median[k] for k in baselines},
        waited_ms=1e3 * statistics.median(s[1] for s in seen["ours"]), limits=row.limits,
    )  # fmt: skip

    def finished() -> None:
        ours()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=3, iterations=1)
