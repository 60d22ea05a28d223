import re
import sys
from pathlib import Path

from snakemake.utils import validate

from fedpipe.studyfile import load_study
from fedpipe.digest import step_digest
from fedpipe.errors import FedpipeError
from fedpipe.io import canonical
from fedpipe.paths import StudyPaths, data_id, measure_id, partition_id, segments

# Jobs find the Python that runs Snakemake, also when its environment is not activated; strict mode is kept.
shell.prefix(f'set -euo pipefail; export PATH="{Path(sys.executable).parent}:$PATH"; ')


def overrides(key, value):
    """`key=value` items for `load_study`: groups of keys are merged, maps such as budgets.bytes and lists replaced."""
    if isinstance(value, dict) and value and all(re.fullmatch(r"[A-Za-z_]\w*", str(k)) for k in value):
        return [item for k, v in value.items() for item in overrides(f"{key}.{k}", v)]
    return [f"{key}={canonical(value)}"]


def configured():
    """The study of `--config study=FILE`, every other key but `segment` and `out` replacing one of its own."""
    if not str(config["segment"]).isdecimal() or int(config["segment"]) < 1:
        raise FedpipeError(f"--config segment: wanted a number of rounds, at least 1, got {config['segment']!r}")
    items = [i for k, v in config.items() if k not in ("study", "segment", "out") for i in overrides(k, v)]
    study = load_study(Path(config["study"]), items)
    return StudyPaths(Path(config.get("out", f"results/{study.name}")), study)


def code_of(step, runs):
    """For a rule's params: the digest of its step's code, by the wildcard that names the output."""
    return lambda wildcards: step_digest(step, runs[wildcards[0]].run)


def of(runs, what):
    """For a rule's inputs: the file `what` of the run that the output's first wildcard names."""
    return lambda wildcards: getattr(runs[wildcards[0]], what)


def last_round(wildcards):
    return int(wildcards.t)


def before(what):
    """For `segment`: the folder `what` of the state that its first round starts from."""

    def folder(wildcards):
        starts = {last: first for first, last in SEGMENTS}
        return getattr(RUNS[wildcards.run], what)(starts[int(wildcards.t)])

    return folder


def at_end(what):
    """For `evaluate`: the folder `what` after the last round."""
    return lambda wildcards: getattr(RUNS[wildcards.run], what)(STUDY.study.rounds)


def results_of_runs(wildcards):
    """For `table` and `report`: all that is measured in every run."""
    whole = [f for p in RUNS.values() for f in (p.clients, p.plans, p.assignment, p.metrics)]
    return whole + [f for p in RUNS.values() for _, last in SEGMENTS for f in (p.rounds(last), p.curve(last))]


try:
    STUDY = configured()
    # Folders are named by what their content depends on; a folder shared by several runs is made from any of them.
    RUNS = {p.run.id: p for p in STUDY.runs}
    DATA = {data_id(p.run): p for p in STUDY.runs}
    PARTITIONS = {partition_id(p.run): p for p in STUDY.runs}
    MEASURES = {measure_id(p.run): p for p in STUDY.runs}
    for paths in RUNS.values():
        step_digest("segment", paths.run)  # an unknown method or model is found here, in one line
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
SEGMENTS = segments(STUDY.study.rounds, int(config["segment"]))
THREADS = STUDY.study.threads


wildcard_constraints:
    data="[^/]+",
    partition="[^/]+",
    measure="[^/]+",
    run="[^/]+",
    t=r"(?!000000)\d{6}",
