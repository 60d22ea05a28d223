"""Error of the predicted peaks: every plan of the grid predicted, then tried with two real batches a phase.

python benchmarks/memory/grid.py [--device cuda] [--quick] [--out FOLDER]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cases import grid, quick
from picture import draw
from trial import opened, rows

from fedpipe import machine
from fedpipe.memory.enforce import mib

RESULTS = Path(__file__).parents[1] / "results"
MEDIAN, WORST = 0.01, 0.03  # the bars
Rows = list[dict[str, Any]]


def summary(found: Rows) -> dict[str, Any]:
    errors = [abs(r["error"]) for r in found]
    return {"rows": len(found), "median": statistics.median(errors), "worst": max(errors)}


def tried(cases: list[Any], device: str) -> Rows:
    found: Rows = []
    begin = time.perf_counter()
    for k, case in enumerate(cases, 1):
        new = rows(case, device)
        found += new
        about = " ".join(map(str, case.about.values()))
        worst = max((abs(r["error"]), r["measured"]) for r in new)
        seconds = time.perf_counter() - begin
        print(f"{k}/{len(cases)} {seconds:5.0f} s  {worst[0]:8.4%} of {mib(worst[1])}  {about}", flush=True)
    return found


def table(found: Rows) -> str:
    """Rows, median and worst error by network and batch."""
    lines = [f"{'network':14}{'batch':>6}{'rows':>6}{'median':>11}{'worst':>11}"]
    for network, batch in sorted({(r["network"], r["batch"]) for r in found}):
        s = summary([r for r in found if (r["network"], r["batch"]) == (network, batch)])
        lines.append(f"{network:14}{batch:6}{s['rows']:6}{s['median']:11.4%}{s['worst']:11.4%}")
    s = summary(found)
    return "\n".join([*lines, f"{'all':20}{s['rows']:6}{s['median']:11.4%}{s['worst']:11.4%}"])


def write(found: Rows, device: str, seconds: float, out: Path) -> None:
    """A row a line, so that two results can be compared as texts."""
    kind = torch.cuda.get_device_name() if device == "cuda" else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    run = opened(next(grid()), device)[0].run
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": kind,
        "platform": machine.describe(run),
        "versions": {p: version(p) for p in ("fedpipe", "torch", "numpy")} | {"python": platform.python_version()},
        "seconds": round(seconds),
        **summary(found),
    }
    head = json.dumps(about, indent=1).removesuffix("\n}")
    body = ",\n".join(f"  {json.dumps(r)}" for r in found)
    stem = out / f"{kind.replace(' ', '-')}-memory"
    out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(f'{head},\n "table": [\n{body}\n ]\n}}\n')
    draw(found, kind, stem.with_suffix(".svg"))
    print(f"{stem}.json, .svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="seconds of the grid; writes nothing without --out")
    parser.add_argument("--out", type=Path, help=f"folder of both files; default: {RESULTS.parent.name}/{RESULTS.name}")
    args = parser.parse_args()
    begin = time.perf_counter()
    found = tried(quick() if args.quick else list(grid()), args.device)
    print(table(found))
    if args.out or not args.quick:
        write(found, args.device, time.perf_counter() - begin, args.out or RESULTS)
    s = summary(found)
    if s["median"] > MEDIAN or s["worst"] > WORST:
        sys.exit(f"over the bars: median {MEDIAN:.0%}, worst {WORST:.0%}")


if __name__ == "__main__":
    main()
