import contextlib
import io
import re
import sys
from functools import cache
from pathlib import Path

import yaml
from snakemake.cli import parse_args
from snakemake.utils import validate

from fedpipe import worker
from fedpipe.studyfile import load_study
from fedpipe.digest import code_digest, step_digest
from fedpipe.errors import FedpipeError
from fedpipe.guard import forget_stale_locks, hold
from fedpipe.io import canonical, digest
from fedpipe.kernels.common import OPS
from fedpipe.machine import host
from fedpipe.mend import mend
from fedpipe.settings import check_settings
from fedpipe.paths import KEEP, StudyPaths, data_id, lasting, measure_id, partition_id, segments

# Jobs find the Python that runs Snakemake, also when its environment is not activated; strict mode is kept.
PYTHON = f'set -euo pipefail; export PATH="{Path(sys.executable).parent}:$PATH"; '


def scalars(value):
    """Snakemake leaves every number inside a list or map of `--config` a text."""
    if isinstance(value, dict):
        return {k: scalars(v) for k, v in value.items()}
    if isinstance(value, list):
        return [scalars(v) for v in value]
    with contextlib.suppress(yaml.YAMLError):
        read = yaml.safe_load(value) if isinstance(value, str) else value
        return read if isinstance(read, int | float | None) else value
    return value


def overrides(key, value):
    """`key=value` items for `load_study`: groups of keys are merged, maps such as budgets.bytes and lists replaced."""
    if isinstance(value, dict) and value and all(re.fullmatch(r"[A-Za-z_]\w*", str(k)) for k in value):
        return [item for k, v in value.items() for item in overrides(f"{key}.{k}", v)]
    return [f"{key}={canonical(scalars(value))}"]


def configured():
    """The study of `--config study=FILE`, every key that is not of the way of running replacing one of its own."""
    for key, also in (("segment", ()), ("jobs_per_round", ("none",))):
        if str(config[key]) not in also and (not str(config[key]).isdecimal() or int(config[key]) < 1):
            wanted = " or ".join(("a whole number, at least 1,", *also)).rstrip(",")
            raise FedpipeError(f"--config {key}: wanted {wanted}, got {config[key]!r}")
    if config["keep"] not in KEEP:
        raise FedpipeError(f"--config keep: wanted {' or '.join(KEEP)}, got {config['keep']!r}")
    where = ("study", "segment", "jobs_per_round", "keep", "worker", "out")
    items = [i for k, v in config.items() if k not in where for i in overrides(k, v)]
    study = load_study(Path(config["study"]), items)
    return StudyPaths(Path(config.get("out", f"results/{study.name}")), study)


def executor():
    """The executor that the command line and its profiles name: a dry run does not say it."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parse_args(sys.argv[1:])[1].executor or "local"
    except SystemExit:  # a profile's path is not that of --directory
        return "as the profile says"


def way():
    """One line: who runs the jobs, how rounds are cut into them, and what is kept."""
    rounds = {
        "whole": "a run a job",
        "jobs": f"{JOBS} train jobs and one aggregate a round",
        "segments": f"{EVERY} rounds a job",
    }
    return f"executor {executor()}, {rounds[ROUNDS]}, keep {config['keep']}"


def code_of(step, runs):
    """For a rule's params: the digest of its step's code, by the wildcard that names the output."""
    digests = {name: step_digest(step, paths.run) for name, paths in runs.items()}
    return lambda wildcards: digests[wildcards[0]]


@cache
def rounds_digest(run):
    """One digest for both ways of cutting rounds into jobs: what one has made the other goes on from."""
    return digest(*(step_digest(s, RUNS[run].run) for s in ("segment", "aggregate")))


def code_of_rounds(wildcards):
    return rounds_digest(wildcards.run)


def of(runs, what):
    """For a rule's inputs: the file `what` of the run that the output's first wildcard names."""
    return lambda wildcards: getattr(runs[wildcards[0]], what)


@cache
def assigned(run):
    """What every job of a run's rounds reads, whatever its round."""
    p = RUNS[run]
    files = {k: str(getattr(p, k)) for k in ("data", "partition", "plans", "route")}
    return {"run": ancient(str(p.spec)), **files}


def world(wildcards):
    """For jobs of rounds, by one function as a long run has thousands: what `assigned` names, and the folders of the
    state they start from. A train job is named by that very round."""
    t = int(wildcards.t)
    t = t if "job" in wildcards.keys() else STARTS[t]
    p = RUNS[wildcards.run]
    return {**assigned(wildcards.run), "state": str(p.state(t)), "own": str(p.own(t))}


def trained_by_jobs(wildcards):
    """For `aggregate`: the folders of the jobs of its round."""
    return [RUNS[wildcards.run].train(int(wildcards.t) - 1, j) for j in range(JOBS)]


def at_end(what):
    """For `evaluate`: the folder `what` after the last round."""
    return lambda wildcards: getattr(RUNS[wildcards.run], what)(STUDY.study.rounds)


def results_of_runs(wildcards):
    """For `table` and `report`: all that is measured in every run. Rounds stand before what needs the last of them, in
    ascending order: each is then planned from the one before, where the last alone would be planned by recursion."""
    for p in RUNS.values():
        yield from (p.data, p.partition, p.clients, *p.chosen, p.prediction, p.tried, p.plans, p.assignment, p.route)
        for _, last in SEGMENTS:
            yield from (p.rounds(last), p.curve(last), p.times(last), p.peaks(last))
        yield p.metrics


def everything(wildcards):
    """For `all`: whatever outlives its job, so that what is missing is made again; never a state that is temp()."""
    yield from results_of_runs(wildcards)
    for p in RUNS.values():
        yield from (f(t) for t in (0, *LASTING) for f in (p.state, p.own))
        if config["keep"] == "all":
            yield from (p.train(t, j) for t in range(STUDY.study.rounds) for j in range(JOBS))
    yield from (STUDY.table, STUDY.report)


try:
    STUDY = configured()
    JOBS = 0 if config["jobs_per_round"] == "none" else int(config["jobs_per_round"])
    # Folders are named by what their content depends on; a folder shared by several runs is made from any of them.
    RUNS = {p.run.id: p for p in STUDY.runs}
    DATA = {data_id(p.run): p for p in STUDY.runs}
    PARTITIONS = {partition_id(p.run): p for p in STUDY.runs}
    MEASURES = {measure_id(p.run): p for p in STUDY.runs}
    SELECTIONS = {p.run.selection: p for p in STUDY.runs if p.run.selection}
    for paths in RUNS.values():
        step_digest("segment", paths.run)  # an unknown method or model is found here, in one line
        check_settings(paths.run.method)
    if workflow.is_main_process and not {"-n", "--dry-run", "--dryrun", "--lint"} & set(sys.argv):
        LOCK = hold(STUDY.root)
        forget_stale_locks(Path.cwd(), STUDY.root)
        mend(STUDY, JOBS)
    if workflow.is_main_process:
        STUDY.write_specs()
except FedpipeError as e:
    sys.exit(f"error: {e}")

validate(
    STUDY.study.model_dump(mode="json"),
    "../schemas/study.schema.json",
    set_default=False,
)
OUT = STUDY.root.as_posix()
# A finished run can be shared between workflows where it is one job: the cache keeps what single jobs make.
SHARED = "omit-software" if workflow.enable_cache else False
ROUNDS = "whole" if SHARED else "jobs" if JOBS else "segments"
EVERY = {"whole": STUDY.study.rounds, "jobs": 1, "segments": int(config["segment"])}[ROUNDS]
WORKER = str(config["worker"]).lower() == "true"
COMMAND = f"python -I -S {worker.__file__} {OUT}" if WORKER else "python -m fedpipe"
shell.prefix(f'{PYTHON}fedpipe() {{{{ {COMMAND} "$@"; }}}}; ')
SEGMENTS = segments(STUDY.study.rounds, EVERY)
STARTS = {last: first for first, last in SEGMENTS}
LASTING = lasting(STUDY.study, int(config["segment"]), config["keep"]) & set(STARTS)
KEPT = "|".join(f"{t:06d}" for t in sorted(LASTING))
PASSING = rf"(?!000000|{KEPT})\d{{6}}"
JOB_FOLDERS = (lambda folder: folder) if config["keep"] == "all" else temp
THREADS = STUDY.study.threads


wildcard_constraints:
    data="[^/]+",
    partition="[^/]+",
    measure="[^/]+",
    selection="[^/]+",
    run="[^/]+",
    job=r"\d+",
