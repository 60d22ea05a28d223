"""How each simulator is started on a job, and how it says the loss of its final model."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import environments
from environments import HERE, ROOT

ROUNDS = {"cnn": (20, 60), "tiny": (500, 1500)}  # a short and a long run: whole segments, so that each costs its share
FEWER = {("flower", "tiny"): (50, 250)}  # where a round costs fifty times as much
SEGMENT = {"cnn": 20, "tiny": 500}  # rounds in a segment; 20 is the default


@dataclass(frozen=True)
class Task:
    """`data` is the .npz of `job.make`, `folder` an empty one for results, `device` cpu or cuda."""

    job: str
    rounds: int
    data: Path
    folder: Path
    device: str


@dataclass(frozen=True)
class Simulator:
    """`python` is None where it is not installed."""

    python: Path | None
    packages: tuple[str, ...]
    command: Callable[[str, Task], list[str]]
    loss: Callable[[str], float]
    saved: str | None = None  # what in the folder of results tells that a round is done; None: the end of the process


def prepare(task: Task) -> None:
    """Give a study its rows as the others have them: decoded and shared out before, as cached files of the study."""
    made = task.data.parent / f"prepared-{task.job}"
    if not made.is_dir():
        first = Task(task.job, 1, task.data, made, task.device)
        made.mkdir()
        command, quiet = in_process(str(OWN), first), subprocess.DEVNULL
        subprocess.run(command, env=environment(first), check=True, stdout=quiet, stderr=quiet)
    for part in ("data", "partition"):
        shutil.copytree(made / "out" / part, task.folder / "out" / part)


def runner(script: str) -> Callable[[str, Task], list[str]]:
    def command(python: str, task: Task) -> list[str]:
        return [python, str(HERE / script), task.job, str(task.data), str(task.rounds)]

    return command


def in_process(python: str, task: Task) -> list[str]:
    study, every = f"{HERE}/studies/{task.job}.yaml", f"evaluate.every={task.rounds}"
    keys = [f"rounds={task.rounds}", every, f"device={task.device}"]
    ways = ["--segment", str(SEGMENT[task.job]), "--out", f"{task.folder}/out"]
    return [python, "-m", "fedpipe", "run", study, "--set", *keys, *ways]


def snakemake(python: str, task: Task) -> list[str]:
    keys = [f"rounds={task.rounds}", f"evaluate={{every: {task.rounds}}}", f"device={task.device}"]
    where = [f"study={HERE}/studies/{task.job}.yaml", f"out={task.folder}/out", f"segment={SEGMENT[task.job]}"]
    profile = ["--profile", f"{ROOT}/profiles/local", "--directory", str(task.folder), "-s", f"{ROOT}/Snakefile"]
    return [python, "-m", "snakemake", *profile, "--config", *where, *keys]


def printed(log: str) -> float:
    """`job.report`'s line, among what the simulator itself prints."""
    return float(next(json.loads(line)["loss"] for line in reversed(log.splitlines()) if line.startswith('{"loss"')))


def tabled(log: str) -> float:
    """Of the table that fedpipe ends with."""
    return float(re.findall(r"^ *Loss +(\S+) *$", log, re.MULTILINE)[-1])


def environment(task: Task) -> dict[str, str]:
    """One thread everywhere, no statistics sent anywhere, the device; where fedpipe finds the rows."""
    added = {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        **{"RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"},
        **{"SIMULATORS_DEVICE": task.device, "PFL_PYTORCH_DEVICE": task.device},
        "JAX_PLATFORMS": task.device,
        "FEDPIPE_DATA": str(task.data.parent),
    }
    return {**os.environ, **added}


OWN = Path(sys.executable)
SAVED = "out/runs/*/rounds/*[0-9].parquet"
SIMULATORS = {
    "plain": Simulator(OWN, ("torch", "numpy"), runner("plain.py"), printed),
    "fedpipe": Simulator(OWN, ("fedpipe", "torch", "numpy"), in_process, tabled, SAVED),
    "snakemake": Simulator(OWN, ("fedpipe", "snakemake", "torch"), snakemake, tabled, SAVED),
    "pfl": Simulator(environments.python("pfl"), ("pfl", "torch", "numpy"), runner("pfl_run.py"), printed),
    "flower": Simulator(environments.python("flower"), ("flwr", "ray", "torch"), runner("flower_run.py"), printed),
    "fedjax": Simulator(environments.python("fedjax"), ("fedjax", "jax", "dm-haiku"), runner("fedjax_run.py"), printed),
}
