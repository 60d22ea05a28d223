"""Finished runs, read from their folders: what the table, the figures and the report are made from."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedpipe.config import Run, Study
from fedpipe.errors import FedpipeError
from fedpipe.io import read_table, table_meta
from fedpipe.studyfile import load_run

Row = dict[str, Any]


@dataclass(frozen=True)
class RunResults:
    """The tables of one run folder, each as a list of rows."""

    folder: Path
    run: Run
    platforms: tuple[str, ...]  # state 0's first
    rounds: list[Row]
    curve: list[Row]
    metrics: list[Row]
    assignment: list[Row]
    plans_table: pa.Table
    assignment_table: pa.Table
    stopped: int | None = None  # the round the study's `stop` was met at

    @cached_property
    def peaks(self) -> list[Row]:
        """Measured peaks (observation): round, client, plan, phase, predicted, measured, budget."""
        return _series(sorted((self.folder / "rounds").glob("*.peaks.obs.parquet")))

    @cached_property
    def seconds(self) -> float | None:
        """Wall time of all rounds that trained (observation)."""
        return self._time("seconds")

    @cached_property
    def captured(self) -> float | None:
        """What of it went into capturing and compiling steps (observation)."""
        return self._time("captured")

    def _time(self, column: str) -> float | None:
        found = (self.folder / "rounds").glob("*.obs.parquet")
        rows = _series(sorted(f for f in found if not f.name.endswith(".peaks.obs.parquet")))
        return sum(r[column] for r in rows) if rows else None

    @property
    def length(self) -> int:
        """Rounds until the run stopped."""
        return self.run.rounds if self.stopped is None else self.stopped

    @property
    def reached(self) -> bool:
        """Whether the run stopped because a target was reached."""
        return self.stopped is not None and self.run.stop is not None and self.run.stop.target is not None

    @cached_property
    def left_out(self) -> list[Row]:
        """Assignment rows, one per client, of those who have no plan in any round."""
        has_plan = {r["client"] for r in self.assignment if r["plan"] is not None}
        return [r for r in first_rows(self.assignment) if r["client"] not in has_plan]

    @property
    def limited(self) -> bool:
        """Whether clients have budgets, and these limit anything."""
        return self.run.budget != "off" and any(r["budget"] is not None for r in self.assignment)

    @property
    def idle(self) -> int:
        """Rounds before the run stopped in which nobody trained."""
        return self.length - len({r["round"] for r in self.rounds})


def load(folder: Path) -> RunResults:
    """Read a finished run's folder; a missing folder or file is an error that names it."""
    if not folder.is_dir():
        raise FedpipeError(f"{folder}: no such run folder; the run has not been made")
    run = load_run(folder / "run.json")
    metrics = read_table(folder / "metrics.parquet")
    plans, assignment = read_table(folder / "plans.parquet"), read_table(folder / "assignment.parquet")
    rounds = sorted(f for f in (folder / "rounds").glob("*.parquet") if not f.name.endswith(".obs.parquet"))
    curve = sorted((folder / "curve").glob("*.parquet"))
    for name, files in (("rounds", rounds), ("curve", curve)):
        if not files:
            raise FedpipeError(f"{folder / name}: holds no *.parquet; the run has not been trained to its end")
    return RunResults(
        folder=folder,
        run=run,
        platforms=_platforms([folder / "plans.parquet", *rounds]),
        rounds=_series(rounds),
        curve=_series(curve),
        metrics=metrics.to_pylist(),
        assignment=assignment.to_pylist(),
        plans_table=plans,
        assignment_table=assignment,
        stopped=table_meta(read_table(rounds[-1]), str(rounds[-1])).get("stopped"),
    )


def load_all(study: Study, folders: list[Path]) -> list[RunResults]:
    """The compared runs in the study's own order of methods and seeds; each of its runs may be given, and no other."""
    wanted, known = {r.id: r for r in study.compared()}, {r.id for r in study.runs()}
    found = {(f.name if (r := load(f)).run.selection else r.run.id): r for f in folders}
    for name, result in found.items():
        if name not in known:
            raise FedpipeError(f"{result.folder}: not a run of the study {study.name}")
    for name in wanted:
        if name not in found:
            raise FedpipeError(f"runs/{name}: a run of the study {study.name}, but not among the run folders given")
    if twice := [k for k, n in Counter((r.label, r.seed) for r in wanted.values()).items() if n > 1]:
        raise FedpipeError(f"methods: two entries are both named {twice[0][0]!r} (seed {twice[0][1]}); wanted one each")
    return [found[name] for name in wanted]


def _platforms(files: list[Path]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(table_meta(read_table(f), str(f)).get("platform", "") for f in files))


def _series(files: Iterable[Path]) -> list[Row]:
    """Rows of per-segment files by round. Files of another segment length may overlap: a round is read from the
    last file that has it, since the file of the last state is always of the newest run; files of an older run, with
    another key, are passed over."""
    by_round: dict[int, list[Row]] = {}
    tables = [(table, table_meta(table).get("key")) for table in map(read_table, files)]
    for table, key in tables:
        if key != tables[-1][1]:
            continue
        rows = table.to_pylist()
        by_round.update({t: [] for t in {r["round"] for r in rows}})
        for row in rows:
            by_round[row["round"]].append(row)
    return [row for t in sorted(by_round) for row in by_round[t]]


def first_rows(assignment: list[Row]) -> list[Row]:
    """Each client's first row, in order of clients."""
    first: dict[int, Row] = {}
    for row in sorted(assignment, key=lambda r: (r["client"], r["round"])):
        first.setdefault(row["client"], row)
    return list(first.values())
