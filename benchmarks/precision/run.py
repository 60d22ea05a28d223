"""What a study's `precision` does to its accuracy: the same study in float32 and in less, paired by seed.

python benchmarks/precision/run.py [--study FILE] [--seeds N] [--set KEY=VALUE ...] [--out FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedpipe import io
from fedpipe.steps.table import interval

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "workflows/studies/quickstart.yaml"
LESS = {"cpu": ("bfloat16",), "cuda": ("bfloat16", "tf32")}
Found = dict[str, dict[str, list[float]]]  # accuracy by precision and method, a seed each


def accuracies(study: Path, keys: list[str]) -> dict[str, list[float]]:
    """Of the last server's model on all test rows, by method, seeds in order."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedpipe", "run", str(study), "--set", *keys, "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        out: dict[str, dict[int, float]] = {}
        for file in Path(folder).glob("runs/*/metrics.parquet"):
            table = io.read_table(file)
            meta = io.table_meta(table)
            row = next(r for r in table.to_pylist() if r["client"] is None and r["column"] == "global")
            out.setdefault(meta["label"], {})[meta["seed"]] = row["accuracy"]
    return {label: [by_seed[s] for s in sorted(by_seed)] for label, by_seed in sorted(out.items())}


def differences(found: Found) -> dict[str, dict[str, dict[str, float | None]]]:
    """Points of accuracy against float32: mean and 95 % t-interval over seeds, by precision and method."""
    return {
        precision: {
            label: interval([100 * (b - a) for a, b in zip(found["float32"][label], got, strict=True)])
            for label, got in by_label.items()
        }
        for precision, by_label in found.items()
        if precision != "float32"
    }


def about(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    what = torch.cuda.get_device_name() if device == "cuda" else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "device": what,
        "cores": os.cpu_count(),
        "versions": {"torch": version("torch"), "fedpipe": version("fedpipe")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=STUDY)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="keys")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>-precision.json")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys = [*args.keys, f"device={device}", f"seeds={list(range(args.seeds))}"]
    found = {p: accuracies(args.study, [*keys, f"precision={p}"]) for p in ("float32", *LESS[device])}
    what = {**about(device), "study": args.study.stem, "keys": args.keys, "accuracy": found}
    file = args.out or ROOT / f"benchmarks/results/{what['device'].replace(' ', '-')}-precision.json"
    file.write_text(json.dumps({**what, "differences": differences(found)}, indent=1) + "\n")
    for precision, by_label in differences(found).items():
        for label, points in by_label.items():
            print(f"{precision}, {label}, points of accuracy against float32:", *(f"{v:+.2f}" for v in points.values()))
    print(file)


if __name__ == "__main__":
    main()
