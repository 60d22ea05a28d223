"""Cost of a job and of a round in every way of running: seconds, CPU, and Snakemake's own share.

python benchmarks/orchestration/run.py [--rounds 100] [--repeat 3] [--out FILE.json]
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUDY = """
name: orchestration
data: {name: digits, rows: 400, size: 8, partition: {kind: iid, clients: 10}}
model: {name: mlp}
methods: [fedavg]
rounds: %d
cohort: 4
evaluate: {every: 20}
local: {epochs: 1, batch: 32, optimizer: {name: sgd, lr: 0.1}}
"""
WAYS: dict[str, list[str] | None] = {  # what follows `snakemake --config`; None is in process
    "in process": None,
    "segments of 20": ["segment=20"],
    "a job a round": ["segment=1"],
    "worker": ["segment=1", "worker=true"],
    "3 jobs a round and aggregate": ["jobs_per_round=3"],
    "worker for 3 jobs and aggregate": ["jobs_per_round=3", "worker=true"],
}
COLUMNS = {
    "seconds": "seconds",
    "cpu": "CPU-s",
    "jobs": "jobs",
    "cpu_job": "CPU-s/job",
    "cpu_round": "CPU-s/round",
    "snakemake": "Snakemake",
    "snakemake_job": "Snakemake/job",
}


def cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


# Runs Snakemake and says what it spent itself, apart from the jobs it waited for.
TIMED = """
import resource, sys
from snakemake.cli import main
try:
    main(sys.argv[1:])
finally:
    own = resource.getrusage(resource.RUSAGE_SELF)
    print(f"own CPU {own.ru_utime + own.ru_stime}", file=sys.stderr, flush=True)
"""


def measure(config: list[str] | None, study: Path, rounds: int) -> dict[str, float]:
    """Seconds and CPU-seconds of one study from nothing; a worker's are counted, as this process adopts it."""
    with tempfile.TemporaryDirectory() as folder:
        if config is None:
            command = [sys.executable, "-m", "fedpipe", "run", str(study), "--out", folder]
        else:
            chosen = [f"study={study}", f"out={folder}/out", *config]
            command = [sys.executable, "-c", TIMED, "-c1", "--directory", folder, "-s", str(ROOT / "Snakefile"),
                       "--config", *chosen]  # fmt: skip
        begin, used = time.perf_counter(), cpu(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - begin
        adopted()
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    spent = cpu(resource.RUSAGE_CHILDREN) - used
    jobs = max(map(int, re.findall(r"^total +(\d+)$", done.stderr, re.MULTILINE)), default=1) - 1  # `all` runs nothing
    own = float((re.findall(r"^own CPU (\S+)$", done.stderr, re.MULTILINE) or [0])[0])
    return {"rounds": rounds, "seconds": seconds, "cpu": spent, "jobs": jobs, "snakemake": own}


def compared(config: list[str] | None, folder: Path, rounds: int) -> dict[str, float]:
    """A study of all rounds, and per job and round what it costs more than one of a fifth: no fixed costs.

    A job's CPU is all but Snakemake's own: the shell of its rule, the step, a worker with its client.
    """
    found = []
    for n in (max(1, rounds // 5), rounds):
        study = folder / f"{n}.yaml"
        study.write_text(STUDY % n)
        found.append(measure(config, study, n))
    more = {k: found[1][k] - found[0][k] for k in found[1]}
    result = {**found[1], "cpu_round": more["cpu"] / more["rounds"]}
    if more["jobs"]:
        result["cpu_job"] = (more["cpu"] - more["snakemake"]) / more["jobs"]
        result["snakemake_job"] = more["snakemake"] / more["jobs"]
    return result


def adopted() -> None:
    """Wait for a worker whose parent has ended: Linux hands it to this process, see `main`."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def main() -> None:
    """Every way in turn, several times over, so that a machine's mood meets all of them; medians are printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS), help="some of: %(default)s")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: a worker's CPU time is reported here, too
    os.environ.update(OMP_NUM_THREADS="1", COLUMNS="200")
    if unknown := set(args.ways.split(",")) - WAYS.keys():
        parser.error(f"--ways: {', '.join(sorted(unknown))}: wanted some of {','.join(WAYS)}")
    ways = {name: WAYS[name] for name in args.ways.split(",")}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeat):
            for name, config in ways.items():
                seen[name].append(compared(config, Path(folder), args.rounds))
    found = {n: {k: statistics.median(m[k] for m in ms) for k in ms[0]} for n, ms in seen.items()}
    print(f"{'':32}" + "".join(f"{c:>15}" for c in COLUMNS.values()))
    for name, figures in found.items():
        print(f"{name:32}" + "".join(f"{figures[c]:15.3f}" if c in figures else f"{'':15}" for c in COLUMNS))
    if args.out:
        versions = {p: version(p) for p in ("fedpipe", "snakemake", "torch")} | {"python": platform.python_version()}
        about = {"date": date.today().isoformat(), "cores": os.cpu_count(), "versions": versions}
        result = {**about, "rounds": args.rounds, "repeat": args.repeat, "medians": found, "all": seen}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
