"""A study in one process: a plain loop over its steps that skips what is whole and was made from the same things."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpipe.allocator import give_back
from fedpipe.errors import FedpipeError
from fedpipe.guard import held
from fedpipe.mend import mend
from fedpipe.methodspec import points
from fedpipe.paths import RunPaths, StudyPaths, lasting, segments
from fedpipe.studyfile import load_run, load_study

KEPT = ("own", "next_own")  # folders of what clients keep; they may be empty, and carry no key of a run


@dataclass(frozen=True)
class Job:
    """One call of a step: what it reads, what it writes, and what its artefacts' key is made from."""

    step: str
    reads: dict[str, Any]
    writes: dict[str, Path]
    keyed: tuple[str, ...] = ()  # the inputs that enter the key


def run_jobs(p: RunPaths, every: int) -> Iterator[Job]:
    """The steps of one run in order."""
    if p.run.selection:
        yield Job("select", {"run": p.select_spec, "metrics": p.tuned}, {"chosen": p.chosen[0]}, ("metrics",))
    yield Job("data", {"run": p.data_spec}, {"data": p.data})
    yield Job("partition", {"run": p.partition_spec, "data": p.data},
              {"partition": p.partition, "clients": p.clients}, ("data",))  # fmt: skip
    yield Job("measure", {"run": p.measure_spec, "data": p.data}, {"prediction": p.prediction, "tried": p.tried},
              ("data",))  # fmt: skip
    assigned = {"plans": p.plans, "assignment": p.assignment, "route": p.route, "state": p.state(0), "own": p.own(0)}
    yield Job("assign", {"run": p.spec, "data": p.data, "clients": p.clients, "prediction": p.prediction}, assigned,
              ("data", "clients", "prediction"))  # fmt: skip
    world = {"run": p.spec, "data": p.data, "partition": p.partition}
    for first, last in segments(p.run.rounds, every):
        yield Job(
            "segment",
            {**world, "plans": p.plans, "route": p.route, "state": p.state(first), "own": p.own(first), "last": last},
            {
                "next_state": p.state(last),
                "next_own": p.own(last),
                "rounds": p.rounds(last),
                "curve": p.curve(last),
                "times": p.times(last),
                "peaks": p.peaks(last),
            },  # fmt: skip
            ("data", "partition", "plans", "route"),
        )
    end = {"state": p.state(p.run.rounds), "own": p.own(p.run.rounds)}
    yield Job("evaluate", {**world, "plans": p.plans, "assignment": p.assignment, **end}, {"metrics": p.metrics},
              ("data", "partition", "plans", "assignment", "state", "own"))  # fmt: skip


def fresh(job: Job) -> bool:
    """Whether all a job writes exists and was made from what its inputs now are."""
    from fedpipe.steps import provenance

    if not all(p.exists() for p in job.writes.values()):
        return False
    try:
        read = [job.reads[k] for k in job.keyed]
        inputs = [f for v in read for f in (v if isinstance(v, list) else [v])]
        key = provenance(job.step, load_run(job.reads["run"]), inputs)["key"]
        return all(_key(p) == key for name, path in job.writes.items() if name not in KEPT for p in _parts(path))
    except FedpipeError:
        return False  # an input is not there, or what is there is of another format


def _parts(path: Path) -> list[Path]:
    """The files of an artefact: itself, or those of its folder."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _key(path: Path) -> str | None:
    """The key an artefact was made with; None where there is none."""
    from fedpipe.io import read_meta

    return str(read_meta(path).get("key")) if path.is_file() else None


def due(jobs: list[Job], last: set[int]) -> list[Job]:
    """The segments to run: those whose metrics are not there, and those whose state is not, though one of them starts
    from it, or `last` names its round."""
    world = ("next_state", "next_own")
    metrics = [fresh(replace(j, writes={k: p for k, p in j.writes.items() if k not in world})) for j in jobs]
    states = [fresh(replace(j, writes={k: p for k, p in j.writes.items() if k in world})) for j in jobs]
    wanted = False
    out = []
    for job, has_metrics, has_state in reversed(list(zip(jobs, metrics, states, strict=True))):
        wanted = not has_metrics or ((wanted or job.reads["last"] in last) and not has_state)
        if wanted:
            out.append(job)
    return out[::-1]


def run_study(
    study: Path, overrides: list[str], methods: list[str] | None, out: Path | None, every: int, keep: str
) -> None:
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
        for method in points(p.run.method):
            load(method)
    with held(paths.root):
        paths.write_specs()
        mend(paths)
        done = [job for p in paths.runs for job in _run(p, every, lasting(spec, every, keep))]
        if _tabulate(paths) or done:
            print_table(paths.table)
        else:
            print("fedpipe: nothing to do, every step is done", file=sys.stderr)
    print(paths.report)


def _run(p: RunPaths, every: int, last: set[int]) -> Iterator[Job]:
    """Run what is due of one run; states that are used up go, unless `last` names their round."""
    before: list[Job] = []
    rounds: list[Job] = []
    after: list[Job] = []
    for job in run_jobs(p, every):
        (rounds if job.step == "segment" else after if rounds else before).append(job)
    for stage in (before, rounds, after):
        ran = False
        for job in due(stage, last) if stage is rounds else (j for j in stage if not fresh(j)):
            _announce(job, p)
            importlib.import_module(f"fedpipe.steps.{job.step}").run(**job.reads, **job.writes)
            first = int(job.reads["state"].name) if stage is rounds else 0
            if first and first not in last:
                shutil.rmtree(p.state(first))
                shutil.rmtree(p.own(first))
            ran = True
            yield job
        if ran:
            give_back()


def _announce(job: Job, p: RunPaths) -> None:
    if job.step != "segment":
        print(f"fedpipe: {job.step} {p.run.label} seed {p.run.seed}", file=sys.stderr, flush=True)


def _tabulate(paths: StudyPaths) -> bool:
    """Make table and report unless they are of these very runs; whether anything was made."""
    from fedpipe.steps import measured, provenance

    folders = [p.folder for p in paths.compared]
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
