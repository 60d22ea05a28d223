"""The table of measured peaks: what was predicted, what the allocator handed out, by how much the process grew."""

from collections.abc import Iterable
from typing import Any

from fedpipe.report import cells
from fedpipe.report.results import RunResults
from fedpipe.report.summaries import is_over

HEADERS = ["Method", "Plan", "Phase", "Budget (MiB)", "Predicted (MiB)", "Measured (MiB)", "Measured / predicted"]


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
