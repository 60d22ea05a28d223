"""What was seen, in sum: medians over repeats, ratios to the plain loop, the table, the file that is kept."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from environments import HERE, ROOT

RESULTS = ROOT / "benchmarks/results"
COLUMNS = {
    "updates_per_cpu_second": "updates/CPU-s",
    "cpu_ratio": "CPU/plain's",
    "wall_per_round": "s/round",
    "startup_wall": "start-up, s",
    "rest_cpu": "rest, CPU-s",
    "peak_mib": "peak, MiB",
    "loss": "loss",
}
Found = dict[str, dict[str, list[dict[str, Any]]]]  # by job and simulator, a repeat each


def calibrate(device: str) -> tuple[float, str]:
    """CPU-seconds of fixed work on this machine, now, and what torch calls the device."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SIMULATORS_DEVICE": device}
    found = json.loads(subprocess.check_output([sys.executable, str(HERE / "calibrate.py")], env=env))
    return found["cpu"], found["device"]


def medians(found: Found) -> dict[str, dict[str, dict[str, float]]]:
    """Over repeats; `cpu_ratio` is CPU time per update over the plain loop's, repeat by repeat."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for job, by_name in found.items():
        plain = by_name.get("plain", [])
        for name, repeats in by_name.items():
            row = {k: statistics.median(r[k] for r in repeats) for k in repeats[0] if k != "runs"}
            if plain:
                pairs = zip(repeats, plain, strict=True)
                row["cpu_ratio"] = statistics.median(r["cpu_per_update"] / p["cpu_per_update"] for r, p in pairs)
            out.setdefault(job, {})[name] = row
    return out


def table(found: Found) -> str:
    lines = []
    for job, rows in medians(found).items():
        lines.append(f"{job:12}" + "".join(f"{c:>15}" for c in COLUMNS.values()))
        for name, row in rows.items():
            lines.append(f"{name:12}" + "".join(f"{row[c]:15.4g}" if c in row else f"{'':15}" for c in COLUMNS))
    return "\n".join(lines)


def about(calibrations: list[tuple[float, str]]) -> dict[str, Any]:
    """When, of what commit, and on what machine."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "device": calibrations[0][1],
        "cores": os.cpu_count(),
        "calibration_cpu_seconds": statistics.median(seconds for seconds, _ in calibrations),
        "calibrations": [seconds for seconds, _ in calibrations],
    }


def parser(text: str | None, kinds: Sequence[str], file: str, repeats: int) -> argparse.ArgumentParser:
    """Arguments of a benchmark that can be run in part: `only` is a list of kinds."""

    def some(given: str) -> list[str]:
        if unknown := set(given.split(",")) - set(kinds):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: wanted some of {','.join(kinds)}")
        return given.split(",")

    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", type=some, default=",".join(kinds), help="some of: %(default)s")
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--out", type=Path, help=f"default: benchmarks/results/<device>-{file}.json")
    return made


def write(what: dict[str, Any], kind: str, out: Path | None) -> Path:
    """As `<device>-<kind>.json`, or where it is wanted."""
    file = out or RESULTS / f"{what['device'].replace(' ', '-')}-{kind}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(what, indent=1) + "\n")
    return file
