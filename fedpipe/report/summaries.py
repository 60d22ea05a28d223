"""Figures of finished runs, as rows of tidy tables.

Round r (from 0) leads from state r to state r + 1, so the server's model of state t has cost the bytes of rounds < t.
A figure that is not known is null, never 0.
"""

import statistics

import pyarrow as pa

from fedpipe.arrow import table
from fedpipe.memory.margin import with_margin
from fedpipe.report.results import Row, RunResults

BYTES = ("payload_up", "header_up", "payload_down", "header_down")
CURVES = pa.schema(
    {"label": pa.string(), "seed": pa.int64(), "round": pa.int32(), "accuracy": pa.float64(), "sent": pa.int64()}
)
CLIENTS = pa.schema(
    {"label": pa.string(), "seed": pa.int64(), "client": pa.int32(), "accuracy": pa.float64(), "left_out": pa.bool_()}
)


def is_over(run: RunResults, peak: int, budget: int | None) -> bool:
    """Whether a predicted peak and the study's margin are over a budget that is kept."""
    return run.limited and budget is not None and with_margin(peak, run.run.margin) > budget


def _of_clients(run: RunResults, column: str) -> list[float]:
    rows = [r for r in run.metrics if r["column"] == column and r["client"] is not None]
    return [r["accuracy"] for r in rows if r["accuracy"] is not None]


def _spread(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation over clients, who are all there are: no n - 1."""
    return (statistics.fmean(values), statistics.pstdev(values)) if values else (None, None)


def summary(run: RunResults) -> Row:
    """One row per run. Accuracies in 0..1, bytes and local steps summed over all rounds and clients, predicted_peak in
    bytes, the most phases anybody trains in a round, pairs of client and phase predicted over budget (null without
    budgets).

    A run stops where its target is reached, so what it trained and sent until then is all it did. An update is lost
    when its client dropped out: a message always has a header.
    `client_*` are the server's model on each client's own test rows, `personal_*` each client's own model there.
    """
    pooled = next((r for r in run.metrics if r["client"] is None and r["column"] == "global"), None)
    client, client_spread = _spread(_of_clients(run, "global"))
    personal, personal_spread = _spread(_of_clients(run, "personal"))
    clients = {r["client"] for r in run.assignment}
    sent = {b: sum(r[b] for r in run.rounds) for b in BYTES}
    return {
        "label": run.run.label,
        "method": run.run.method.name,
        "seed": run.run.seed,
        "accuracy": pooled["accuracy"] if pooled else None,
        "loss": pooled["loss"] if pooled else None,
        "client_accuracy": client,
        "client_spread": client_spread,
        "personal_accuracy": personal,
        "personal_spread": personal_spread,
        **sent,
        "steps": sum(r["steps"] for r in run.rounds),
        "clients": len(clients),
        "taking_part": len(clients) - len(run.left_out),
        "left_out": len(run.left_out),
        "rounds": run.length,
        "platforms": len(run.platforms),
        "idle_rounds": run.idle,
        "failed_updates": len({(r["round"], r["client"], r["part"]) for r in run.rounds if r["failed"]}),
        "lost_updates": sum(r["phase"] == 0 and not r["failed"] and not r["header_up"] for r in run.rounds),
        "reached": int(run.reached) if run.run.stop and run.run.stop.target is not None else None,
        "rounds_to_target": run.stopped if run.reached else None,
        "bytes_to_target": sum(sent.values()) if run.reached else None,
        **_planned(run),
    }


def _planned(run: RunResults) -> Row:
    peaks: dict[str, list[int]] = {}
    for r in run.plans_table.select(["plan", "predicted"]).to_pylist():
        peaks.setdefault(r["plan"], []).append(r["predicted"])
    given = [(r, peaks[r["plan"]]) for r in run.assignment if r["plan"] is not None]
    over = {(r["client"], i) for r, mine in given for i, p in enumerate(mine) if is_over(run, p, r["budget"])}
    return {
        "phases": max((len(mine) for _, mine in given), default=None),
        "predicted_peak": max((p for _, mine in given for p in mine), default=None),
        "over_budget": len(over) if run.limited else None,
    }


def observed(run: RunResults) -> Row:
    """One row per run of what was measured: largest peak (bytes), largest measured / predicted, largest share of a
    budget above it (0: within all), seconds (all, those of capturing steps, and to the target where it was reached)."""
    measured = [p for p in run.peaks if p["measured"] is not None]
    judged = [p["measured"] / p["budget"] - 1 for p in measured if p["budget"] is not None and run.limited]
    return {
        "label": run.run.label,
        "seed": run.run.seed,
        "measured_peak": max((p["measured"] for p in measured), default=None),
        "peak_ratio": max((p["measured"] / p["predicted"] for p in measured if p["predicted"]), default=None),
        "peak_excess": max(0.0, *judged) if judged else None,
        "seconds": run.seconds,
        "captured": run.captured,
        "seconds_to_target": run.seconds if run.reached else None,
    }


def curves(runs: list[RunResults]) -> pa.Table:
    """Accuracy of the server's model on all test rows, and the bytes sent up and down until then (schema CURVES)."""
    rows = []
    for run in runs:
        for at in run.curve:
            sent = sum(r[b] for r in run.rounds if r["round"] < at["round"] for b in BYTES)
            row = {"label": run.run.label, "seed": run.run.seed, "sent": sent}
            rows.append({**row, "round": at["round"], "accuracy": at["accuracy"]})
    return table(rows, CURVES)


def client_accuracies(runs: list[RunResults]) -> pa.Table:
    """Final accuracy of the server's model on each client's own test rows (schema CLIENTS)."""
    rows = []
    for run in runs:
        out = {r["client"] for r in run.left_out}
        for r in run.metrics:
            if r["column"] == "global" and r["client"] is not None:
                row = {"label": run.run.label, "seed": run.run.seed, "left_out": r["client"] in out}
                rows.append({**row, "client": r["client"], "accuracy": r["accuracy"]})
    return table(rows, CLIENTS)
