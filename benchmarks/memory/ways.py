"""Every way to fit a network into a budget, in bytes: full training with and without recomputation, width slices,
FeDepth's blocks and its scenarios.

python benchmarks/memory/ways.py [--batch N] [--device cuda] [--out FOLDER]
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cases import OPTIMIZERS
from trial import images

from fedpipe.config import Study
from fedpipe.loop.capture import PROGRAMS
from fedpipe.memory.parts import KINDS
from fedpipe.memory.trial import tried
from fedpipe.report.figures import colour, styled
from fedpipe.runtime import Runtime
from fedpipe.types import Plan, Row

ROOT = Path(__file__).parents[2]
MIB = 2**20
WIDTHS = {"1/8": 0.125, "1/6": 0.166, "1/3": 0.333, "1/2": 0.5}
SHARES = {"1/8": 1 / 8, "1/6": 1 / 6, "1/3": 1 / 3, "1/2": 1 / 2}
LEVELS = {"preresnet20": (1,), "vit_tiny": (1, 2), "mobilenet": ()}
SLICED = ("preresnet20", "mobilenet")


@dataclass(frozen=True)
class Way:
    """A method under a budget: bytes, or the share of the network that published blocks go by."""

    name: str
    method: str | dict[str, Any] = "fedavg"
    local: dict[str, Any] = field(default_factory=dict)
    share: float | None = None  # of the activations
    like: str | None = None  # a way whose peak is the budget


def ways(network: str, units: tuple[str, ...]) -> Iterator[Way]:
    """The ways of a network; those that others are like come first."""
    yield Way("whole")
    for level in LEVELS[network]:
        yield Way(f"whole, level {level}", local={"levels": {"b*": level}})
    yield Way("whole, each unit again", local={"again": [(u, u) for u in units]})
    if network in SLICED:
        for name, width in WIDTHS.items():
            yield Way(f"width {name}", {"heterofl": {"widths": [width]}})
            yield Way(f"blocks in the bytes of width {name}", {"fedepth": {"scenario": "lack"}}, like=f"width {name}")
    for name, share in SHARES.items():
        yield Way(f"published blocks {name}", {"fedepth": {"blocks": "paper", "scenario": "lack"}}, share=share)
        yield Way(f"published blocks {name}, a head each", {"fedepth_mhead": {"blocks": "paper", "scenario": "lack"}},
                  share=share)  # fmt: skip
    yield Way("surplus: a peer beside the whole", {"fedepth": {"blocks": "paper", "scenario": "surplus"}}, share=2.0)


def runtime(network: str, way: Way, batch: int, device: str) -> Runtime:
    local = {"batch": batch, "optimizer": OPTIMIZERS["sgd"], **way.local}
    data = {"name": "digits", "partition": {"kind": "iid", "clients": 10}}
    study = {"name": "ways", "data": data, "model": network, "methods": [way.method], "rounds": 1, "local": local}
    (run,) = Study.model_validate({**study, "device": device}).runs()
    return Runtime(run, images(batch))


def measured(network: str, way: Way, batch: int, device: str, budget: int | None) -> dict[str, Any]:
    """A row: predicted and measured peak of the largest phase, and what the prediction is made of; null where the
    budget holds no plan."""
    rt = runtime(network, way, batch, device)
    ctx = rt.plan_ctx(Row(budget=budget, samples=batch, ratio=way.share))
    plan = rt.method.plan(ctx) if rt.method.plan else Plan()
    row: dict[str, Any] = {"network": network, "way": way.name, "budget": budget, "phases": 0, "left_out": 0}
    if plan is None:
        return {**row, "predicted": None, "measured": None, **dict.fromkeys(KINDS)}
    plan = rt.levelled(plan)
    parts = max(rt.predictor.parts(plan), key=lambda p: p.peak)
    found = max(p.bytes for p in tried(rt, plan, torch.arange(batch)))
    PROGRAMS.known.clear()
    counts = {"phases": len(plan.phases), "left_out": dict(plan.model).get("skip", 0)}
    return {**row, **counts, "predicted": parts.peak, "measured": found, **{k: getattr(parts, k) for k in KINDS}}


@styled
def draw(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """A bar a way, in the colours of what its peak is made of; a mark where it was measured."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(r["network"] for r in rows))
    figure = Figure(figsize=(9.6, 0.24 * len(rows) + 1.5), layout="constrained")
    ratios = [sum(r["network"] == n for r in rows) for n in networks]
    for axes, network in zip(figure.subplots(len(networks), 1, height_ratios=ratios), networks, strict=True):
        mine = [r for r in rows if r["network"] == network][::-1]
        left = [0.0] * len(mine)
        for k, kind in enumerate(KINDS):
            sizes = [(r[kind] or 0) / MIB for r in mine]
            axes.barh(range(len(mine)), sizes, left=left, color=colour(k), label=kind, height=0.7)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        there = [(r["measured"] / MIB, i) for i, r in enumerate(mine) if r["measured"]]
        axes.scatter(*zip(*there, strict=True), marker="|", color="black", s=60, label="measured", zorder=3)
        axes.set_yticks(range(len(mine)), [r["way"] for r in mine])
        axes.set_title(f"{network}, {device}")
        axes.set_xlabel("peak of a client, MiB")
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| network | way | phases | left out | budget | predicted, MiB | measured | of the whole |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    whole = {r["network"]: r["measured"] for r in rows if r["way"] == "whole"}
    for r in rows:
        sizes = [f"{v / MIB:.2f}" if v else "" for v in (r["budget"], r["predicted"], r["measured"])]
        share = f"{r['measured'] / whole[r['network']]:.0%}" if r["measured"] else "does not fit"
        cells = [r["network"], r["way"], str(r["phases"] or ""), str(r["left_out"] or ""), *sizes, share]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for network in LEVELS:
        peaks: dict[str, int] = {}
        for way in ways(network, runtime(network, Way("whole"), 2, "cpu").build().names[1:-1]):
            row = measured(network, way, args.batch, args.device, peaks[way.like] if way.like else None)
            peaks[way.name] = row["predicted"]
            rows.append(row)
            print(f"{network}, {way.name}: {row['predicted']} predicted, {row['measured']} measured", flush=True)
    cuda = args.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.stdout.strip() or None}
    about |= {"device": device, "batch": args.batch, "cores": os.cpu_count(), "python": platform.python_version()}
    stem = args.out / f"{device.replace(' ', '-')}-ways"
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "torch": version("torch"), "table": rows}, indent=1)
    stem.with_suffix(".json").write_text(text + "\n")
    head = f"{device}, batch {args.batch}, {about['date']}, commit {about['commit']}."
    stem.with_suffix(".md").write_text(f"{head}\n\n{table(rows)}")
    draw(rows, device, stem.with_suffix(".svg"))
    print(stem.with_suffix(".md"))


if __name__ == "__main__":
    main()
