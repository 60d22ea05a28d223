"""The same job by several simulators of federated learning: client updates per CPU-second, start-up, memory.

python benchmarks/simulators/run.py --install             # once: an environment for each
python benchmarks/simulators/run.py [--jobs cnn,tiny] [--simulators plain,fedpipe,...] [--repeats N] [--out FILE]
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import environments
import meter
import summary
from environments import HERE
from job import CLASSES, COHORT
from simulators import FEWER, ROUNDS, SIMULATORS, Task, environment, prepare


def once(name: str, job: str, rounds: int, data: Path, device: str) -> dict[str, Any]:
    """One run from nothing: its cost and the loss of its final model."""
    simulator = SIMULATORS[name]
    with tempfile.TemporaryDirectory() as folder:
        task = Task(job, rounds, data, Path(folder), device)
        log = Path(folder) / "log"
        if simulator.saved:
            prepare(task)
        cost = meter.measure(simulator.command(str(simulator.python), task), environment(task), log)
        return {"rounds": rounds, **cost.row(), "loss": simulator.loss(log.read_text())}


def first_round(name: str, job: str, data: Path, device: str) -> float:
    """Seconds from the start of a process until one round is done."""
    simulator = SIMULATORS[name]
    with tempfile.TemporaryDirectory() as folder:
        task = Task(job, 1, data, Path(folder), device)
        if simulator.saved:
            prepare(task)
        quiet = subprocess.DEVNULL
        begin = time.perf_counter()
        process = subprocess.Popen(
            simulator.command(str(simulator.python), task), env=environment(task), stdout=quiet, stderr=quiet
        )
        while process.poll() is None and not (simulator.saved and any(Path(folder).glob(simulator.saved))):
            time.sleep(0.01)
        took = time.perf_counter() - begin
        if process.wait():
            sys.exit(f"{name}, {job}: one round ended with {process.returncode}")
        return took


def compared(name: str, job: str, data: Path, device: str) -> dict[str, Any]:
    """A short and a long run, whose difference is what rounds cost, and the time to the end of a first round."""
    short, long = (once(name, job, rounds, data, device) for rounds in FEWER.get((name, job), ROUNDS[job]))
    if not long["loss"] < math.log(CLASSES):
        sys.exit(f"{name}, {job}: loss {long['loss']} after {long['rounds']} rounds is no better than a guess")
    more = long["rounds"] - short["rounds"]
    cpu, wall = ((long[k] - short[k]) / more for k in ("cpu", "seconds"))
    return {
        "cpu_per_update": cpu / COHORT,
        "updates_per_cpu_second": COHORT / cpu,
        "wall_per_round": wall,
        "startup_wall": first_round(name, job, data, device),
        "rest_cpu": short["cpu"] - cpu * short["rounds"],
        "peak_mib": long["pss"] / 2**20,
        "loss": long["loss"],
        "runs": [short, long],
    }


def some(text: str, known: list[str], parser: argparse.ArgumentParser) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: wanted some of {','.join(known)}")
    return names


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make the environments, then end")
    parser.add_argument("--jobs", default=",".join(ROUNDS))
    parser.add_argument("--simulators", default=",".join(SIMULATORS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>-simulators.json")
    args = parser.parse_args()
    args.jobs = some(args.jobs, list(ROUNDS), parser)
    args.simulators = some(args.simulators, list(SIMULATORS), parser)
    return args


def repeated(found: summary.Found, folder: Path, args: argparse.Namespace) -> Path:
    """Every simulator in turn, several times over, so that a machine's mood meets all of them.

    The file is written after every repeat, so that an interrupted run leaves something.
    """
    # In a process of its own: libraries that this one has loaded, too, would count half in others' memory.
    subprocess.run([sys.executable, str(HERE / "job.py"), str(folder)], check=True)
    names = list(found[args.jobs[0]])
    versions = {n: environments.versions(SIMULATORS[n].python, SIMULATORS[n].packages) for n in names}
    calibrations = []
    for repeat in range(args.repeats):
        calibrations.append(summary.calibrate(args.device))
        for job in args.jobs:
            for name in names:
                row = compared(name, job, folder / "rows.npz", args.device)
                found[job][name].append(row)
                each = 1000 * row["cpu_per_update"]
                print(f"{repeat + 1}/{args.repeats} {job} {name}: {each:.2f} CPU-ms an update", flush=True)
        what = {**summary.about(calibrations), "versions": versions, "rounds": {job: ROUNDS[job] for job in args.jobs}}
        file = summary.write({**what, "medians": summary.medians(found), "all": found}, "simulators", args.out)
    return file


def main() -> None:
    args = parsed()
    if args.install:
        wanted = [n for n in environments.NAMES if n in args.simulators]
        sys.exit(not all([environments.install(n) for n in wanted]))
    names = [n for n in args.simulators if SIMULATORS[n].python]
    for name in set(args.simulators) - set(names):
        print(f"{name}: not installed (run.py --install), left out")
    found: summary.Found = {job: {name: [] for name in names} for job in args.jobs}
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = repeated(found, Path(folder), args)
        except RuntimeError as e:
            sys.exit(str(e))
    print(summary.table(found))
    print(file)


if __name__ == "__main__":
    main()
