"""What fedpipe costs as a study grows: clients a round, rounds, parameters, processes.

python benchmarks/scaling/run.py [--only cohort,rounds,parameters,processes] [--repeats N] [--out FILE]
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "simulators"))  # its rows, its meter, its calibration

import environments
import meter
import summary
from environments import HERE, ROOT
from simulators import Task, environment

STUDY = HERE / "studies/tiny.yaml"  # one linear layer, 100 clients of 50 images, 10 a round
COLUMNS = {
    "updates": "updates",
    "cpu": "CPU-s",
    "seconds": "seconds",
    "cpu_ms_per_update": "CPU-ms/update",
    "cpu_ms_per_round": "CPU-ms/round",
    "updates_per_second": "updates/s",
    "peak_mib": "peak, MiB",
    "disk_mib": "disk, MiB",
}


@dataclass(frozen=True)
class Point:
    """A study at two lengths in rounds; what it costs per update and round is their difference, without start-up."""

    name: str
    rounds: tuple[int, int]
    keys: tuple[str, ...] = ()  # replace those of the study
    cohort: int = 10
    seeds: int = 1
    cores: int | None = None  # of Snakemake; None: in process


def points(kind: str) -> Iterator[Point]:
    if kind == "cohort":
        for n in (1, 10, 100):
            yield Point(f"{n} clients a round", (200 // n, 2200 // n), (f"cohort={n}",), n)
    if kind == "rounds":
        for before, after in ((100, 300), (300, 900), (900, 2700)):
            yield Point(f"{after} rounds", (before, after))
    if kind == "parameters":
        for hidden in (8, 64, 512, 2048):
            count = 3072 * hidden + 2 * hidden**2 + 10 * hidden + 3 * hidden + 10
            model = f"model={{name: mlp, hidden: [{hidden}, {hidden}, {hidden}]}}"
            yield Point(f"{count:,} parameters", (20, 60), (model,))
    if kind == "processes":
        for cores in (1, 2):
            yield Point(f"2 seeds, snakemake -c{cores}", (100, 400), seeds=2, cores=cores)


KINDS = ("cohort", "rounds", "parameters", "processes")


def command(point: Point, rounds: int, folder: Path) -> list[str]:
    keys = [*point.keys, f"rounds={rounds}", "device=cpu", f"seeds={list(range(point.seeds))}"]
    if point.cores is None:
        keys += [f"evaluate.every={rounds}"]
        return [sys.executable, "-m", "fedpipe", "run", str(STUDY), "--set", *keys, "--out", f"{folder}/out"]
    where = [f"study={STUDY}", f"out={folder}/out", "segment=100", f"evaluate={{every: {rounds}}}"]
    start = [sys.executable, "-m", "snakemake", f"-c{point.cores}", "--directory", str(folder)]
    return [*start, "-s", f"{ROOT}/Snakefile", "--config", *where, *keys]


def once(point: Point, rounds: int, data: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = environment(Task("tiny", rounds, data, folder, "cpu"))
        cost = meter.measure(command(point, rounds, folder), env, folder / "log")
        disk = sum(f.stat().st_size for f in (folder / "out").rglob("*") if f.is_file())
    return {"rounds": rounds, **cost.row(), "disk": disk}


def measured(point: Point, data: Path) -> dict[str, Any]:
    short, long = (once(point, rounds, data) for rounds in point.rounds)
    rounds = point.seeds * (long["rounds"] - short["rounds"])
    cpu, seconds = (long[k] - short[k] for k in ("cpu", "seconds"))
    return {
        "updates": point.seeds * point.cohort * long["rounds"],
        "cpu": long["cpu"],
        "seconds": long["seconds"],
        "cpu_ms_per_update": 1000 * cpu / (rounds * point.cohort),
        "cpu_ms_per_round": 1000 * cpu / rounds,
        "updates_per_second": rounds * point.cohort / seconds,
        "peak_mib": long["pss"] / 2**20,
        "disk_mib": long["disk"] / 2**20,
        "runs": [short, long],
    }


def medians(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    return {n: {c: statistics.median(r[c] for r in rows) for c in COLUMNS} for n, rows in found.items() if rows}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'':28}" + "".join(f"{c:>15}" for c in COLUMNS.values())]
    middle = medians(found)
    lines += [f"{name:28}" + "".join(f"{row[c]:15.4g}" for c in COLUMNS) for name, row in middle.items()]
    one, two = (middle.get(f"2 seeds, snakemake -c{cores}") for cores in (1, 2))
    if one and two:
        lines.append(f"throughput, -c2 over -c1: {two['updates_per_second'] / one['updates_per_second']:.2f}")
    return "\n".join(lines)


def main() -> None:
    """Every point in turn, several times over; the file is written after each time."""
    args = summary.parser(__doc__, KINDS, "scaling", repeats=3).parse_args()
    chosen = [p for kind in args.only for p in points(kind)]
    found: dict[str, list[dict[str, Any]]] = {p.name: [] for p in chosen}
    versions = environments.versions(Path(sys.executable), ("fedpipe", "snakemake", "torch", "numpy"))
    calibrations = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(HERE / "job.py"), folder], check=True)
        for repeat in range(args.repeats):
            calibrations.append(summary.calibrate("cpu"))
            for point in chosen:
                row = measured(point, Path(folder) / "rows.npz")
                found[point.name].append(row)
                each = f"{row['cpu_ms_per_update']:.2f} CPU-ms an update"
                print(f"{repeat + 1}/{args.repeats} {point.name}: {each}", flush=True)
            what = {**summary.about(calibrations), "versions": versions, "medians": medians(found), "all": found}
            file = summary.write(what, "scaling", args.out)
    print(table(found))
    print(file)


if __name__ == "__main__":
    main()
