"""Whole studies, from nothing to the report: in process, as jobs of Snakemake, and by two processes.

python benchmarks/scaling/whole.py [--only cnn,quickstart,processes] [--rounds N] [--repeats N] [--out FILE]
"""

import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "simulators"))  # its rows, its meter, its calibration

import environments
import meter
import summary
from environments import HERE, ROOT
from simulators import Task, environment

CNN, QUICKSTART = HERE / "studies/cnn.yaml", ROOT / "workflows/studies/quickstart.yaml"
SEGMENT = 100  # rounds in a job of the CNN: a minute
IN_PROCESS = "in process"
KINDS = ("cnn", "quickstart", "processes")


@dataclass(frozen=True)
class Way:
    """A study in one way of running; `cores` of Snakemake, None: in process."""

    kind: str
    name: str
    study: Path
    cores: int | None
    keys: tuple[str, ...] = ()
    where: tuple[str, ...] = ()


def ways(rounds: int) -> list[Way]:
    cnn, few = (f"rounds={rounds}",), (f"rounds={2 * SEGMENT}", "seeds=[0, 1]")
    cut = (f"segment={SEGMENT}",)
    return [
        Way("cnn", IN_PROCESS, CNN, None, (*cnn, f"evaluate.every={rounds}")),
        Way("cnn", "snakemake -c1", CNN, 1, (*cnn, f"evaluate={{every: {rounds}}}"), cut),
        Way("quickstart", IN_PROCESS, QUICKSTART, None),
        Way("quickstart", "snakemake -c1", QUICKSTART, 1),
        Way("processes", "snakemake -c1", CNN, 1, (*few, f"evaluate={{every: {2 * SEGMENT}}}"), cut),
        Way("processes", "snakemake -c2", CNN, 2, (*few, f"evaluate={{every: {2 * SEGMENT}}}"), cut),
    ]


def command(way: Way, folder: Path) -> list[str]:
    keys = [*way.keys, "device=cpu"]
    if way.cores is None:
        return [sys.executable, "-m", "fedpipe", "run", str(way.study), "--set", *keys, "--out", f"{folder}/out"]
    start = [sys.executable, "-m", "snakemake", f"-c{way.cores}", "--directory", str(folder), "-s", f"{ROOT}/Snakefile"]
    return [*start, "--config", f"study={way.study}", f"out={folder}/out", *way.where, *keys]


def once(way: Way, data: Path) -> dict[str, Any]:
    """Its cost, and how many jobs Snakemake ran."""
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name, "log")
        cost = meter.measure(command(way, folder), environment(Task("cnn", 0, data, folder, "cpu")), log)
        jobs = max(map(int, re.findall(r"^total +(\d+)$", log.read_text(), re.MULTILINE)), default=1) - 1
    return {**cost.row(), "jobs": jobs}  # the job `all` runs nothing


def medians(found: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, dict[str, float]]:
    """By kind: seconds of each way, jobs, and the ratio of the second way to the first, repeat by repeat."""
    out = {}
    for kind, by_name in found.items():
        if not all(by_name.values()):
            continue
        seconds = {n: [r["seconds"] for r in rows] for n, rows in by_name.items()}
        first, second = seconds.values()
        row = {n: statistics.median(s) for n, s in seconds.items()}
        row |= {"jobs": statistics.median(r["jobs"] for r in [*by_name.values()][1])}
        row |= {"ratio": statistics.median(b / a for a, b in zip(first, second, strict=True))}
        if kind == "quickstart":
            each = [(b - 1.1 * a) / r["jobs"] for a, b, r in zip(first, second, [*by_name.values()][1], strict=True)]
            row |= {"seconds a job beyond 1.1 of it": statistics.median(each)}
        out[kind] = row
    return out


def main() -> None:
    """Every way in turn, several times over; the file is written after each time."""
    parser = summary.parser(__doc__, KINDS, "whole", repeats=1)
    parser.add_argument("--rounds", type=int, default=600, help="of the CNN: %(default)s, about five minutes")
    args = parser.parse_args()
    chosen = [w for w in ways(args.rounds) if w.kind in args.only]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {w.kind: {} for w in chosen}
    versions = environments.versions(Path(sys.executable), ("fedpipe", "snakemake", "torch", "numpy"))
    calibrations = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(HERE / "job.py"), folder], check=True)
        for repeat in range(args.repeats):
            calibrations.append(summary.calibrate("cpu"))
            for way in chosen:
                row = once(way, Path(folder) / "rows.npz")
                found[way.kind].setdefault(way.name, []).append(row)
                print(f"{repeat + 1}/{args.repeats} {way.kind}, {way.name}: {row['seconds']:.1f} s", flush=True)
            about = {**summary.about(calibrations), "versions": versions, "rounds": args.rounds, "segment": SEGMENT}
            file = summary.write({**about, "medians": medians(found), "all": found}, "whole", args.out)
    for kind, row in medians(found).items():
        print(kind, ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
    print(file)


if __name__ == "__main__":
    main()
