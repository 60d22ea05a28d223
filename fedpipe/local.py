"""A study in one process: a plain loop over its steps that skips what is whole and was made from the same things."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe.errors import Damaged, FedpipeError
from fedpipe.paths import RunPaths, StudyPaths, segments
from fedpipe.studyfile import load_run, load_study

KEPT = ("own", "next_own")  # folders of what clients keep; they may be empty, and carry no key of a run


@dataclass(frozen=True)
class Job:
    """One call of a step: what it reads, what it writes, and what its artefacts' key is made from."""

    step: str
    reads: dict[str, Any]
    writes: dict[str, Path]
    keyed: tuple[str, ...] = ()  # the inputs that enter the key
    keyed_as: str | None = None  # states carry one key, whatever way of running made them


def run_jobs(p: RunPaths, every: int) -> Iterator[Job]:
    """The steps of one run in order."""
    yield Job("data", {"run": p.data_spec}, {"data": p.data})
    yield Job("partition", {"run": p.partition_spec, "data": p.data},
              {"partition": p.partition, "clients": p.clients}, ("data",))  # fmt: skip
    yield Job("measure", {"run": p.measure_spec, "data": p.data}, {"prediction": p.prediction}, ("data",))
    assigned = {"plans": p.plans, "assignment": p.assignment, "route": p.route, "state": p.state(0), "own": p.own(0)}
    yield Job("assign", {"run": p.spec, "data": p.data, "clients": p.clients, "prediction": p.prediction}, assigned,
              ("data", "clients", "prediction"))  # fmt: skip
    world = {"run": p.spec, "data": p.data, "partition": p.partition}
    for first, last in segments(p.run.rounds, every):
        yield Job(
            "segment",
            {**world, "plans": p.plans, "route": p.route, "state": p.state(first), "own": p.own(first), "last": last},
            {"next_state": p.state(last), "next_own": p.own(last), "rounds": p.rounds(last), "curve": p.curve(last)},
            ("data", "partition", "plans", "route"),
        )
    end = {"state": p.state(p.run.rounds), "own": p.own(p.run.rounds)}
    yield Job("evaluate", {**world, "plans": p.plans, "assignment": p.assignment, **end}, {"metrics": p.metrics},
              ("data", "partition", "plans", "assignment", "state", "own"))  # fmt: skip


def fresh(job: Job) -> bool:
    """Whether all a job writes exists whole and was made from what its inputs now are."""
    from fedpipe.steps import provenance

    if not all(path.exists() if name in KEPT else _parts(path) for name, path in job.writes.items()):
        return False
    try:
        key = provenance(job.step, load_run(job.reads["run"]), [job.reads[k] for k in job.keyed])["key"]
    except FedpipeError as e:
        return _unfit(e)
    keys = [(name, _key(part)) for name, path in job.writes.items() for part in _parts(path)]
    return all(found is not None and (name in KEPT or found == key) for name, found in keys)


def _parts(path: Path) -> list[Path]:
    """The files of an artefact: itself, or those of its folder."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []


def _key(path: Path) -> str | None:
    """The key an artefact was made with; None where it is missing, damaged (which is said) or not ours."""
    from fedpipe.io import read_meta

    try:
        return str(read_meta(path).get("key")) if path.is_file() else None
    except FedpipeError as e:
        _unfit(e)
        return None


def _unfit(error: FedpipeError) -> bool:
    if isinstance(error, Damaged):
        print(f"fedpipe: {str(error).partition(';')[0]}; making it again", file=sys.stderr)
    return False


def run_study(study: Path, overrides: list[str], methods: list[str] | None, out: Path | None, every: int) -> None:
    """Run a study to its table and report. Steps that are done are skipped; the first failure stops it."""
    from fedpipe.digest import step_digest
    from fedpipe.methods import load
    from fedpipe.report.terminal import print_table

    if every < 1:
        raise FedpipeError(f"--segment: {every}; wanted a number of rounds, at least 1")
    spec = load_study(study, overrides, methods)
    paths = StudyPaths(out or Path("results") / spec.name, spec)
    for p in paths.runs:  # what is named but not there is found before anything is made
        step_digest("segment", p.run)
        load(p.run.method)
    paths.write_specs()
    done, total = 0, 0
    for p in paths.runs:
        for job in run_jobs(p, every):
            total += 1
            if not fresh(job):
                done += 1
                _announce(job, p)
                importlib.import_module(f"fedpipe.steps.{job.step}").run(**job.reads, **job.writes)
    if _tabulate(paths) or done:
        print_table(paths.table)
    else:
        print(f"fedpipe: nothing to do, all {total} steps are done", file=sys.stderr)
    print(paths.report)


def _announce(job: Job, p: RunPaths) -> None:
    if job.step != "segment":
        print(f"fedpipe: {job.step} {p.run.label} seed {p.run.seed}", file=sys.stderr, flush=True)


def _tabulate(paths: StudyPaths) -> bool:
    """Make table and report unless they are of these very runs; whether anything was made."""
    from fedpipe.steps import measured, provenance

    folders = [p.folder for p in paths.runs]
    inputs = [f for folder in folders for f in measured(folder)]
    table_key = provenance("table", paths.study, inputs)["key"]
    report_key = provenance("report", paths.study, inputs)["key"]
    stale = _key(paths.table) != table_key
    if stale:
        importlib.import_module("fedpipe.steps.table").run(study=paths.spec, runs=folders, table=paths.table)
    if stale or not paths.report.is_file() or report_key not in paths.report.read_text():
        report = importlib.import_module("fedpipe.steps.report")
        report.run(study=paths.spec, table=paths.table, runs=folders, report=paths.report)
        return True
    return False
