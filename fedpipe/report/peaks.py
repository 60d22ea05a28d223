"""Measured peaks as tables: what was predicted, what the allocator handed out, by how much the process grew."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedpipe.report import cells
from fedpipe.report.plan_picture import Group, groups
from fedpipe.report.results import RunResults
from fedpipe.report.summaries import is_over

HEADERS = ["Method", "Plan", "Phase", "Budget (MiB)", "Predicted (MiB)", "Measured (MiB)", "Measured / predicted"]
LARGEST = ["Network", "Method", "Budget", "Budget (MiB)", "Phases", "Predicted (MiB)", "Measured (MiB)"]


def measured_peaks(runs: list[RunResults]) -> cells.Shown:
    """The largest of every plan and phase that was measured, over rounds and seeds."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        for p in run.peaks:
            marked = cells.over(is_over(run, p["predicted"], p["budget"]))
            key = (run.run.label, p["plan"], p["phase"], p["budget"], p["predicted"], marked, run.limited)
            if p["measured"] is not None:
                found.setdefault(key, []).append(p)
    order = list(dict.fromkeys(r.run.label for r in runs))
    keys = sorted(found, key=lambda k: (order.index(k[0]), k[3] or 0, k[1:3], k[4]))
    return cells.Shown([*HEADERS, "Process grew by (MiB)", "Times measured"], [_row(k, found[k]) for k in keys])


def _row(key: tuple[Any, ...], seen: list[dict[str, Any]]) -> list[str]:
    label, plan, phase, budget, predicted, marked, limited = key
    measured = max(p["measured"] for p in seen)
    limit = "none" if budget is None else cells.mib(budget)
    ratio = f"{measured / predicted:.3f}" if predicted else ""
    beyond = limited and budget is not None and measured > budget
    sizes = [limit, cells.mib(predicted) + marked, cells.mib(measured) + cells.over(beyond), ratio, _most(seen)]
    return [label, plan, str(phase + 1), *sizes, str(len(seen))]


def _most(seen: Iterable[dict[str, Any]]) -> str:
    grew = max((p["resident"] for p in seen if p.get("resident") is not None), default=None)
    return "" if grew is None else cells.mib(grew)


@dataclass(frozen=True)
class Largest:
    """The largest phase of clients of one budget: what its predicted peak is made of, and the measured one."""

    run: RunResults
    group: Group
    parts: dict[str, Any] | None  # None: left out
    measured: int | None

    @property
    def predicted(self) -> int | None:
        return None if self.parts is None else self.parts["predicted"]

    @property
    def over(self) -> tuple[bool, bool]:
        """Whether the prediction, with the study's margin, and what was measured are over the budget."""
        budget = self.group.budget if self.run.limited else None
        if budget is None or self.predicted is None:
            return False, False
        return is_over(self.run, self.predicted, budget), (self.measured or 0) > budget


def largest(runs: list[RunResults]) -> list[Largest]:
    """A row per network, method and budget, of each method's first run."""
    first: dict[str, RunResults] = {}
    for run in runs:
        first.setdefault(run.run.label, run)
    networks = list(dict.fromkeys(r.run.model.name for r in first.values()))
    out = []
    for run in sorted(first.values(), key=lambda r: networks.index(r.run.model.name)):
        for group in groups(run.plans_table, run.assignment_table):
            parts = max(group.phases, key=lambda p: p["predicted"], default=None)
            plans = {p["plan"] for p in group.phases}
            seen = [p["measured"] for p in run.peaks if p["plan"] in plans and p["measured"] is not None]
            out.append(Largest(run, group, parts, max(seen, default=None)))
    return out


def by_budget(rows: list[Largest]) -> cells.Shown:
    """`largest` as a table; marked is what is over its budget."""
    return cells.Shown(LARGEST, [_of_budget(r) for r in rows])


def _of_budget(row: Largest) -> list[str]:
    budget, (predicted, measured) = row.group.budget, row.over
    sizes = ["" if budget is None else cells.mib(budget), str(len(row.group.phases) or "left out")]
    sizes += [cells.mib(row.predicted) + cells.over(predicted), cells.mib(row.measured) + cells.over(measured)]
    return [row.run.run.model.name, row.run.run.label, row.group.name or "none", *sizes]
