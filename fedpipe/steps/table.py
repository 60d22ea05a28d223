"""Step `table`: the runs of a study as one row per method setting, with intervals over seeds, and their figures."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa

from fedpipe import arrow
from fedpipe.config import Study
from fedpipe.errors import FedpipeError
from fedpipe.io import checksum, write_table, write_text
from fedpipe.report import cells, figures
from fedpipe.report.claims import remarks
from fedpipe.report.intervals import holm, interval, p_value
from fedpipe.report.results import Row, RunResults, load_all
from fedpipe.report.summaries import BYTES, client_accuracies, curves, observed, summary
from fedpipe.steps import measured, provenance
from fedpipe.studyfile import load_study

SCORES = ("accuracy", "loss", "client_accuracy", "client_spread", "personal_accuracy", "personal_spread")
AMOUNTS = (*BYTES, "steps", "clients", "taking_part", "left_out", "rounds", "platforms", "idle_rounds",
           "failed_updates", "lost_updates")  # fmt: skip
SOME = ("rounds_to_target", "bytes_to_target", "over_budget")  # of the runs that reached it, or have budgets


def _known(rows: list[Row], column: str) -> dict[int, float]:
    return {r["seed"]: r[column] for r in rows if r[column] is not None}


def _difference(rows: list[Row], first: list[Row], column: str) -> Row:
    """Over seeds, this method minus the first; `differs` only when the interval excludes 0."""
    mine, theirs = _known(rows, column), _known(first, column)
    pairs = [] if rows is first else [mine[s] - theirs[s] for s in mine if s in theirs]
    d = interval(pairs)
    claim = None if d["low"] is None or d["high"] is None else d["low"] > 0 or d["high"] < 0
    names = {"diff": d["mean"], "diff_low": d["low"], "diff_high": d["high"], "differs": claim, "p": p_value(pairs)}
    return {f"{column}_{k}": v for k, v in names.items()}


def _largest(values: Sequence[Any]) -> Any:
    return max((v for v in values if v is not None), default=None)


def _row(rows: list[Row], first: list[Row], paper: dict[str, float]) -> Row:
    label, method = rows[0]["label"], rows[0]["method"]
    out: Row = {"label": label, "method": method, "seeds": len(rows)}
    for column in SCORES:
        s = interval(list(_known(rows, column).values()))
        out |= {column: s["mean"], **{f"{column}_{k}": s[k] for k in ("std", "low", "high")}}
        out |= _difference(rows, first, column)
    out["paper"] = paper.get(label, paper.get(method))
    out |= {c: fmean(r[c] for r in rows) for c in AMOUNTS}
    reached = _known(rows, "reached").values()
    out["reached"] = sum(reached) if reached else None
    out |= {c: interval(list(_known(rows, c).values()))["mean"] for c in SOME}
    out |= {c: _largest([r[c] for r in rows]) for c in ("phases", "predicted_peak")}
    return out


def _type(column: str) -> pa.DataType:
    if column in ("label", "method"):
        return pa.string()
    if column in ("seeds", "phases", "predicted_peak", "measured_peak", "reached"):
        return pa.int64()
    return pa.bool_() if column.endswith("_differs") else pa.float64()


def _typed(rows: list[Row]) -> pa.Table:
    return arrow.table(rows, pa.schema({c: _type(c) for c in rows[0]}))


def _by_label(rows: list[Row]) -> list[list[Row]]:
    return [[r for r in rows if r["label"] == label] for label in dict.fromkeys(r["label"] for r in rows)]


def tabulate(study: Study, runs: list[RunResults]) -> pa.Table:
    """One row per label: seeds, scores with `_std _low _high` and `_diff _diff_low _diff_high _differs _p` (p by Holm
    over the column) against the study's first method, the paper's accuracy, amounts as means over seeds (bytes, steps,
    clients, rounds), how many seeds reached the study's target (null without one), means over these of rounds and bytes
    until then, pairs of client and phase over budget (mean; null without budgets), most phases and largest peak."""
    known = {name for r in study.compared() for name in (r.label, r.method.name)}
    for name, value in study.paper.items():
        if name not in known or not 0 <= value <= 1:
            raise FedpipeError(f"paper.{name}: wanted one of the study's methods and an accuracy in 0..1 (got {value})")
    groups = _by_label([summary(r) for r in runs])
    found = [_row(rows, groups[0], study.paper) for rows in groups]
    for column in SCORES:
        for row, p in zip(found, holm([r[f"{column}_p"] for r in found]), strict=True):
            row[f"{column}_p"] = p
    return _typed(found)


def observations(runs: list[RunResults]) -> pa.Table:
    """One row per label: largest measured peak (bytes), measured / predicted and share above a budget, mean seconds of
    a run and until it reached the target."""
    out = []
    for rows in _by_label([observed(r) for r in runs]):
        row = {"label": rows[0]["label"], "seeds": len(rows)}
        row |= {c: _largest([r[c] for r in rows]) for c in ("measured_peak", "peak_ratio", "peak_excess")}
        seconds = ("seconds", "captured", "seconds_to_target")
        out.append({**row, **{c: interval(list(_known(rows, c).values()))["mean"] for c in seconds}})
    return _typed(out)


def pictured(runs: list[RunResults]) -> dict[str, RunResults]:
    """First run of each label whose plans are worth a picture: more than one, or clients without any."""
    first: dict[str, RunResults] = {}
    for run in runs:
        first.setdefault(run.run.label, run)
    several = {k: len({r["plan"] for r in v.assignment}) > 1 for k, v in first.items()}
    return {k: v for k, v in first.items() if several[k] or v.left_out}


def _figures(folder: Path, runs: list[RunResults]) -> None:
    points = curves(runs)
    figures.save(figures.accuracy_over_rounds(points), folder / "accuracy_rounds")
    figures.save(figures.accuracy_over_bytes(points), folder / "accuracy_bytes")
    figures.save(figures.client_distribution(client_accuracies(runs)), folder / "accuracy_clients")
    for label, run in pictured(runs).items():
        picture = figures.plan_picture(run.plans_table, run.assignment_table)
        figures.save(picture, folder / figures.plan_file(label))


def run(study: Path, runs: list[Path], *, table: Path) -> None:
    """Write table.parquet, and beside it .obs.parquet, .md, .tex and figures/ (SVG and PNG). `runs` are run folders."""
    spec = load_study(study)
    results = load_all(spec, runs)
    rows = tabulate(spec, results)
    _figures(table.parent / "figures", results)
    made = {**provenance("table", spec, [f for r in results for f in measured(r.folder)]), "study": spec.name}
    write_table(table.with_suffix(".obs.parquet"), observations(results), made)
    shown, said = cells.present(rows), remarks(spec, [summary(r) for r in results])
    note = " ".join([*said, cells.note(shown)])
    write_text(table.with_suffix(".md"), cells.markdown(shown, note))
    write_text(table.with_suffix(".tex"), cells.latex(shown, note))
    texts = [table.with_suffix(".md"), table.with_suffix(".tex"), *sorted((table.parent / "figures").iterdir())]
    beside = {f.relative_to(table.parent).as_posix(): checksum(f) for f in texts}
    write_table(table, rows, {**made, "first": rows["label"][0].as_py(), "beside": beside, "remarks": said})
