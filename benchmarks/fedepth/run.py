"""Time of a FeDepth round on PreResNet-20, four clients of four budgets: fedpipe against the published code's way.

python benchmarks/fedepth/run.py [--repeats N] [--samples N] [--epochs N] [--out FILE]
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sides import RATIOS, SIDES, Job, Losses, Ours, Published, opened, timed

ROOT = Path(__file__).parents[2]
BARS = {"fixed": 1.7, "redraw": 1.25, "fixed, six blocks": 2.2}
NEAR = 0.02  # relative difference of losses: ReLUs flip on rounding
TIMES_PLAIN = 3  # so far from float64 as the published way in float32, by the norm over all clients' parameters
Found = dict[str, list[list[float]]]  # by side and repeat: CPU-seconds of each client, then of the mean


def serve(side: str, job: Job, pipe: Connection) -> None:
    """A process of one side: a round for each word that comes."""
    here = opened(side, job)
    while pipe.recv():
        pipe.send(timed(here))


@contextmanager
def processes(job: Job) -> Iterator[dict[str, Connection]]:
    """One for each side, as allocators and caches are a process's own; they wait while another one runs."""
    context = multiprocessing.get_context("spawn")
    pipes, started = {}, []
    for side in SIDES:
        pipes[side], there = context.Pipe()
        started.append(context.Process(target=serve, args=(side, job, there)))
        started[-1].start()
        there.close()
    try:
        yield pipes
    finally:
        for pipe, process in zip(pipes.values(), started, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join()


def ratios(found: Found) -> dict[str, float]:
    """How many times as long the published way takes, repeat by repeat, medians."""

    def ratio(side: str, part: slice) -> float:
        pairs = zip(found["published"], found[side], strict=True)
        return median(sum(p[part]) / sum(o[part]) for p, o in pairs)

    sides = SIDES[1:]
    return {s: ratio(s, slice(None)) for s in sides} | {f"{s}, six blocks": ratio(s, slice(1)) for s in sides}


def table(found: Found, first: dict[str, list[float]]) -> str:
    budgets = [f"budget {r:.2f}" for r in RATIOS]
    columns = ["round", *budgets, "mean", "first round"]
    lines = [f"{'CPU-seconds':18}" + "".join(f"{c:>13}" for c in columns)]
    for side, rows in found.items():
        cells = [median(map(sum, rows)), *map(median, zip(*rows, strict=True)), sum(first[side])]
        lines.append(f"{side:18}" + "".join(f"{c:13.3f}" for c in cells))
    for name, ratio in ratios(found).items():
        bar = f"  (bar {BARS[name]})" if name in BARS else ""
        lines.append(f"published / {name}: {ratio:.2f}{bar}")
    return "\n".join(lines)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((a[n.removeprefix("model/")] - t).square().sum()) for n, t in b.items()))


def apart(a: Losses, b: Losses) -> float:
    """Largest relative difference of two lists of losses."""
    pairs = zip(a, b, strict=True)
    return max(abs(x - y) / abs(y) for p, q in pairs for x, y in zip(p, q, strict=True))


def checked() -> dict[str, dict[str, float]]:
    """A small round of the same batches both ways, and in float64: how far apart losses and parameters end.

    The published way runs in both orders of dimensions and counts by the larger distance: which ReLUs flip on rounding
    goes by the order, and of a small round either none or some do.
    """
    found, job = {}, Job(samples=32, epochs=2, batch=16)
    for batches in SIDES[1:]:
        ours = Ours(job, batches)
        exact = Published(replace(job, precision="float64"), ours)
        plain = [Published(job, ours, layout) for layout in (torch.contiguous_format, torch.channels_last)]
        near, squares = 0.0, [0.0] * 3
        for k in range(len(RATIOS)):
            true, runs = exact.train(k)[0], [side.train(k) for side in (ours, *plain)]
            near = max(near, apart(runs[0][1], runs[1][1]))
            squares = [s + distance(true, sent) ** 2 for s, (sent, _) in zip(squares, runs, strict=True)]
        mine, *theirs = map(math.sqrt, squares)
        found[batches] = {"losses": near, "to float64": mine, "published to float64": max(theirs)}
    return found


def refused(check: dict[str, dict[str, float]]) -> list[str]:
    return [
        f"{batches}: losses {c['losses']:.1e} apart, {c['to float64']:.1e} from float64 "
        f"(published {c['published to float64']:.1e})"
        for batches, c in check.items()
        if c["losses"] > NEAR or c["to float64"] > TIMES_PLAIN * c["published to float64"]
    ]


def write(found: Found, job: Job, more: dict[str, Any], out: Path | None) -> Path:
    kind = f"CPU-{torch.backends.cpu.get_cpu_capability()}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.strip() or None,
        "device": kind.replace("-", " "),
        "cores": os.cpu_count(),
        "versions": {p: version(p) for p in ("fedpipe", "torch", "numpy")} | {"python": platform.python_version()},
        "samples": job.samples,
        "epochs": job.epochs,
        "batch": job.batch,
        "ratios": ratios(found),
        "medians": {side: median(map(sum, rows)) for side, rows in found.items()},
        **more,
        "all": found,
    }
    file = out or ROOT / "benchmarks/results" / f"{kind}-fedepth.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about, indent=1) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=256, help="of a client")
    parser.add_argument("--epochs", type=int, default=4, help="of a phase; the paper has 10")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<cpu>-fedepth.json")
    args = parser.parse_args()
    job, found = Job(args.samples, args.epochs), Found({side: [] for side in SIDES})
    check = checked()
    if wrong := refused(check):
        sys.exit("\n".join(wrong))
    with processes(job) as pipes:
        first: dict[str, list[float]] = {}
        for repeat in range(args.repeats + 1):  # the first warms up: what is made once per process is made in it
            for side, pipe in pipes.items():
                pipe.send(True)
                cpu = pipe.recv()
                print(f"{repeat}/{args.repeats} {side}: {sum(cpu):.2f} CPU-s", flush=True)
                if repeat:
                    found[side].append(cpu)
                else:
                    first[side] = cpu
    print(table(found, first))
    print(write(found, job, {"first": first, "check": check}, args.out))


if __name__ == "__main__":
    main()
