"""A study in one process: a plain loop over its steps that skips what is whole and was made from the same things."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe.config import load_run, load_study
from fedpipe.errors import Damaged, FedpipeError
from fedpipe.paths import RunPaths, StudyPaths, segments


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
    from fedpipe.io import read_meta
    from fedpipe.steps import content, provenance

    try:
        key = provenance(job.step, load_run(job.reads["run"]), [job.reads[k] for k in job.keyed])["key"]
        for name, path in job.writes.items():
            for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
                content(part)
                if name not in ("own", "next_own") and read_meta(part)["key"] != key:
                    return False
            if path.is_dir() and name in ("state", "next_state") and not any(path.iterdir()):
                return False
    except Damaged as e:
        if "damaged" in str(e):
            print(f"fedpipe: {e}; making it again", file=sys.stderr)
        return False
    except FedpipeError:
        return False  # of another format, or not ours: made again
    return all(p.exists() for p in job.writes.values())


def run_study(study: Path, overrides: list[str], methods: list[str] | None, out: Path | None, every: int) -> None:
    """Run a study to its table and report. Steps that are done are skipped; the first failure stops it."""
    from fedpipe.terminal import print_table

    if every < 1:
        raise FedpipeError(f"--segment: {every}; wanted a number of rounds, at least 1")
    spec = load_study(study, overrides, methods)
    paths = StudyPaths(out or Path("results") / spec.name, spec)
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
    from fedpipe.io import read_meta
    from fedpipe.steps import measured, provenance

    folders = [p.folder for p in paths.runs]
    inputs = [f for folder in folders for f in measured(folder)]
    table_key = provenance("table", paths.study, inputs)["key"]
    report_key = provenance("report", paths.study, inputs)["key"]
    try:
        stale = read_meta(paths.table)["key"] != table_key
    except FedpipeError:
        stale = True
    if stale:
        importlib.import_module("fedpipe.steps.table").run(study=paths.spec, runs=folders, table=paths.table)
    if stale or not paths.report.is_file() or report_key not in paths.report.read_text():
        report = importlib.import_module("fedpipe.steps.report")
        report.run(study=paths.spec, table=paths.table, runs=folders, report=paths.report)
        return True
    return False
