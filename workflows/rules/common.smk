import contextlib
import io
import re
import sys
from pathlib import Path

from snakemake.cli import parse_args
from snakemake.utils import validate

from fedpipe.studyfile import load_study
from fedpipe.digest import step_digest
from fedpipe.errors import FedpipeError
from fedpipe.guard import forget_stale_locks, hold, mend
from fedpipe.io import canonical
from fedpipe.paths import KEEP, StudyPaths, data_id, lasting, measure_id, partition_id, segments

# Jobs find the Python that runs Snakemake, also when its environment is not activated; strict mode is kept.
PYTHON = f'set -euo pipefail; export PATH="{Path(sys.executable).parent}:$PATH"; '


def overrides(key, value):
    """`key=value` items for `load_study`: groups of keys are merged, maps such as budgets.bytes and lists replaced."""
    if isinstance(value, dict) and value and all(re.fullmatch(r"[A-Za-z_]\w*", str(k)) for k in value):
        return [item for k, v in value.items() for item in overrides(f"{key}.{k}", v)]
    return [f"{key}={canonical(value)}"]


def configured():
    """The study of `--config study=FILE`, every other key but `segment` and `out` replacing one of its own."""
    for key, least in (("segment", 1), ("jobs_per_round", 0)):
        if not str(config[key]).isdecimal() or int(config[key]) < least:
            raise FedpipeError(f"--config {key}: wanted a whole number, at least {least}, got {config[key]!r}")
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
    rounds = f"{JOBS} train jobs and one aggregate a round" if JOBS else f"{config['segment']} rounds a job"
    return f"executor {executor()}, {rounds}, keep {config['keep']}"


def code_of(step, runs):
    """For a rule's params: the digest of its step's code, by the wildcard that names the output."""
    digests = {name: step_digest(step, paths.run) for name, paths in runs.items()}
    return lambda wildcards: digests[wildcards[0]]


def of(runs, what):
    """For a rule's inputs: the file `what` of the run that the output's first wildcard names."""
    return lambda wildcards: getattr(runs[wildcards[0]], what)


def last_round(wildcards):
    return int(wildcards.t)


def world(what):
    """For jobs of rounds: the folder `what` of the state they start from. A train job is named by that very round."""

    def folder(wildcards):
        t = int(wildcards.t)
        return getattr(RUNS[wildcards.run], what)(t if "job" in wildcards.keys() else STARTS[t])

    return folder


def trained_by_jobs(wildcards):
    """For `aggregate`: the folders of the jobs of its round."""
    folder = RUNS[wildcards.run].folder / "train" / f"{int(wildcards.t) - 1:06d}"
    return [folder / str(j) for j in range(JOBS)]


def at_end(what):
    """For `evaluate`: the folder `what` after the last round."""
    return lambda wildcards: getattr(RUNS[wildcards.run], what)(STUDY.study.rounds)


def results_of_runs(wildcards):
    """For `table` and `report`: all that is measured in every run. Rounds stand before what needs the last of them, in
    ascending order: each is then planned from the one before, where the last alone would be planned by recursion."""
    for p in RUNS.values():
        yield from (p.data, p.partition, p.clients, p.prediction, p.plans, p.assignment, p.route)
        for _, last in SEGMENTS:
            yield from (p.rounds(last), p.curve(last))
        yield p.metrics


def everything(wildcards):
    """For `all`: whatever outlives its job, so that what is missing is made again; never a state that is temp()."""
    yield from results_of_runs(wildcards)
    for p in RUNS.values():
        yield from (f(t) for t in LASTING if t in ENDS for f in (p.state, p.own))
    yield from (STUDY.table, STUDY.report)


try:
    STUDY = configured()
    # Folders are named by what their content depends on; a folder shared by several runs is made from any of them.
    RUNS = {p.run.id: p for p in STUDY.runs}
    DATA = {data_id(p.run): p for p in STUDY.runs}
    PARTITIONS = {partition_id(p.run): p for p in STUDY.runs}
    MEASURES = {measure_id(p.run): p for p in STUDY.runs}
    SELECTIONS = {p.run.selection: p for p in STUDY.runs if p.run.selection}
    for paths in RUNS.values():
        step_digest("segment", paths.run)  # an unknown method or model is found here, in one line
    if workflow.is_main_process and not {"-n", "--dry-run", "--dryrun", "--lint"} & set(sys.argv):
        LOCK = hold(STUDY.root)
        forget_stale_locks(Path.cwd(), STUDY.root)
        mend(STUDY)
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
JOBS = int(config["jobs_per_round"])
WORKER = str(config["worker"]).lower() == "true"
COMMAND = f"python -m fedpipe.worker run {OUT} --" if WORKER else "python -m fedpipe"
shell.prefix(f'{PYTHON}fedpipe() {{{{ {COMMAND} "$@"; }}}}; ')
ENDS = {last for _, last in segments(STUDY.study.rounds, int(config["segment"]))}
SEGMENTS = segments(STUDY.study.rounds, 1 if JOBS else int(config["segment"]))
STARTS = {last: first for first, last in SEGMENTS}
LASTING = lasting(STUDY.study, int(config["segment"]), config["keep"])
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
