"""`fedpipe explain STUDY`: who would train what in how many bytes, as tables and pictures; nothing is trained."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from fedpipe import io
from fedpipe.errors import FedpipeError
from fedpipe.guard import held
from fedpipe.local import fresh, run_jobs
from fedpipe.memory.parts import KINDS
from fedpipe.paths import RunPaths, StudyPaths
from fedpipe.report import figures
from fedpipe.report.plan_picture import Group, groups
from fedpipe.report.terminal import print_rows
from fedpipe.studyfile import load_study

HEADERS = ("Clients", "Budget", "Phase", "Trains", "Runs again", *(k.capitalize() for k in KINDS), "Peak", "Of budget")


def explain(study: Path, overrides: list[str], methods: list[str] | None, out: Path | None) -> None:
    """Run the steps up to `assign` for the first seed of every setting; print its plans, and draw them beside.

    Settings that a selection would tune are shown for every point of their grid. A plan over its budget is shown, too,
    with a line that says so. Files lie in `explain/` in the results folder. Raises the first FedpipeError, once the
    others have been shown.
    """
    spec = load_study(study, overrides, methods)
    spec = spec.model_copy(update={"budget": "warn"}) if spec.budget == "enforce" else spec
    paths = StudyPaths((out or Path("results") / spec.name) / "explain", spec)
    shown: set[str] = set()
    failed: list[FedpipeError] = []
    with held(paths.root):
        paths.write_specs()
        for p in paths.runs:
            if p.run.selection is None and p.run.label not in shown:
                shown.add(p.run.label)
                try:
                    _plan(p)
                    _show(p, paths.root)
                except FedpipeError as e:
                    failed.append(FedpipeError(f"{p.run.label}: {e}"))
                    print(f"fedpipe: {failed[-1]}", file=sys.stderr, flush=True)
    if failed:
        raise failed[0]


def _plan(p: RunPaths) -> None:
    for job in run_jobs(p, p.run.rounds):
        if job.step == "segment":
            return
        if not fresh(job):
            print(f"fedpipe: {job.step} {p.run.label}", file=sys.stderr, flush=True)
            importlib.import_module(f"fedpipe.steps.{job.step}").run(**job.reads, **job.writes)


def _show(p: RunPaths, folder: Path) -> None:
    plans, assignment = io.read_table(p.plans), io.read_table(p.assignment)
    rows = [row for group in groups(plans, assignment) for row in _rows(group)]
    print_rows(f"{p.run.label}: the predicted peak of each phase, in MiB", list(HEADERS), rows)
    picture = folder / figures.plan_file(p.run.label)
    figures.save(figures.plan_picture(plans, assignment), picture)
    print(f"picture: {picture}.svg\n")


def _rows(group: Group) -> list[list[str]]:
    who = [str(group.clients), group.title]
    if not group.phases:
        needs = "" if group.needs is None else f"left out: needs {_mib(group.needs)}"
        return [[*who, "", needs, "", *[""] * len(KINDS), "", ""]]
    return [
        [*(who if i == 0 else ["", ""]), f"{i + 1} {phase['name']}", spans(phase["trains"]), _again(phase)]
        + [_mib(phase[k]) for k in KINDS]
        + [_mib(phase["predicted"]), _share(phase["predicted"], group.budget)]
        for i, phase in enumerate(group.phases)
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def _share(peak: int, budget: int | None) -> str:
    return "" if budget is None else f"{peak / budget:.0%}"


def spans(words: list[str]) -> str:
    """`stem b1-b3 head`: words that end in numbers in a row are shortened."""
    out: list[list[str]] = []
    for word in words:
        before = re.fullmatch(r"(.*?)(\d+)(.*)", out[-1][-1]) if out else None
        follows = before and f"{before[1]}{int(before[2]) + 1}{before[3]}" == word
        out[-1:] = [[out[-1][0], word]] if follows else [*out[-1:], [word]]
    return " ".join("-".join(run) for run in out)


def _again(phase: dict[str, Any]) -> str:
    """`b1-b3 at 1, b4, b5-b6`: units at a level, and ranges that run again as one."""
    by_level: dict[int, list[str]] = {}
    for x in phase["levels"] or ():
        by_level.setdefault(x["level"], []).append(x["units"])
    levels = [f"{spans(units)} at {level}" for level, units in by_level.items() if level]
    ranges = [x["first"] if x["first"] == x["last"] else f"{x['first']}-{x['last']}" for x in phase["again"] or ()]
    return ", ".join([*levels, *ranges])
