"""The table of all rows, when they are done."""

from importlib.metadata import version
from typing import Any

import torch
from rows import BANDWIDTH, DEVICE


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """The device and the versions that the figures depend on; date and commit are there already."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else machine_info["cpu"].get("brand_raw", "cpu")
    machine_info["kernels"] = {"device": name, **{p: version(p) for p in ("torch", "triton")}}


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [b.extra_info for b in session.benchmarks if "row" in b.extra_info] if session else []
    if not rows:
        return
    write = terminalreporter.write_line
    write(f"on {DEVICE}; ideal time at {BANDWIDTH / 1e9:.0f} GB/s; copies: time over that of a copy of n floats")
    head = "".join(f"{name:>10}" for name in ("B/entry", "ideal ms", "ours ms", "GB/s", "copies"))
    write(f"{'kernel':38}{'n':>12}{head}  times faster than")
    for r in rows:
        ratios = ", ".join(f"{k} {v:.2f}" for k, v in r["ratios"].items())
        shown = (r[k] for k in ("bytes_per_entry", "ideal_ms", "ours_ms", "gb_per_s", "copies"))
        write(f"{r['row']:38}{r['n']:12,}{''.join(f'{v:10.3f}' for v in shown)}  {ratios}")
