"""Plans as data: made from client rows, kept one per distinct plan, written to and read from `plans.parquet`."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from fedpipe.io import canonical
from fedpipe.memory.parts import KINDS, Parts
from fedpipe.types import Phase, Plan, Step, Window, matches

_PATTERNS = ("live", "still", "down", "up", "fixed", "hold", "keep", "reply")
_OF_PHASES = ("live", "still")
_STEP = pa.struct([(p, pa.string()) for p in ("mask", "variate", "anchor")] + [("mu", pa.float64())])
_LEVELS = pa.list_(pa.struct([("units", pa.string()), ("level", pa.int32())]))
_AGAIN = pa.list_(pa.struct([("first", pa.string()), ("last", pa.string())]))
_INDEX = pa.list_(pa.struct([("name", pa.string()), ("dim", pa.int32()), ("start", pa.int32()), ("stop", pa.int32())]))
SCHEMA = pa.schema(
    [("plan", pa.string()), ("phase", pa.int32()), ("name", pa.string())]
    + [(p, pa.list_(pa.string())) for p in _PATTERNS]
    + [
        ("epochs", pa.int32()),
        ("steps", pa.int32()),
        ("data", pa.string()),
        ("upto", pa.string()),
        ("since", pa.string()),
    ]
    + [
        ("kept", pa.int64()),
        ("lr", pa.float64()),
        ("carry", pa.bool_()),
        ("index", _INDEX),
        ("model", pa.string()),
        ("weight", pa.string()),
    ]
    + [
        ("step", _STEP),
        ("levels", _LEVELS),
        ("again", _AGAIN),
        ("trains", pa.list_(pa.string())),
        ("predicted", pa.int64()),
    ]
    + [(k, pa.int64()) for k in KINDS]  # what the predicted peak is made of
)


def key(plan: Plan) -> str:
    """Canonical text of a plan: equal plans, equal text."""
    return canonical(dataclasses.asdict(plan))


def trained_units(phase: Phase, names: tuple[str, ...], tensors: tuple[str, ...]) -> list[str]:
    """Units of which at least one tensor is trained."""
    live = [t for t in tensors if matches(f"model/{t}", phase.live) and not matches(f"model/{t}", phase.still)]
    return [u for u in names if any(t.startswith(f"{u}.") for t in live)]


def plan_rows(
    plans: dict[str, Plan], predicted: Callable[[Plan], list[Parts]], names: tuple[str, ...], tensors: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Rows of `plans.parquet`, one per plan and phase."""
    rows = []
    for pid, plan in plans.items():
        shared: dict[str, Any] = {p: list(getattr(plan, p)) for p in _PATTERNS if p not in _OF_PHASES}
        shared |= {"index": [dataclasses.asdict(w) for w in plan.index], "weight": plan.weight}
        for i, (phase, parts) in enumerate(zip(plan.phases, predicted(plan), strict=True)):
            own = dataclasses.asdict(phase) | {
                **{p: list(getattr(phase, p)) for p in _OF_PHASES},
                "levels": [{"units": u, "level": n} for u, n in phase.levels],
                "again": [{"first": a, "last": b} for a, b in phase.again],
            }
            rows.append(
                {"plan": pid, "phase": i, **own, **shared, "model": canonical(dict(plan.model))}
                | {"trains": trained_units(phase, names, tensors), "predicted": parts.peak}
                | dataclasses.asdict(parts)
            )
    return rows


def read_plans(table: pa.Table) -> tuple[dict[str, Plan], dict[tuple[str, int], Parts]]:
    """Plans by name, and what the predicted peak of each (plan, phase) is made of."""
    by_plan: dict[str, list[dict[str, Any]]] = {}
    for r in table.to_pylist():
        by_plan.setdefault(r["plan"], []).append(r)
    plans: dict[str, Plan] = {}
    predicted: dict[tuple[str, int], Parts] = {}
    phase_words = [f.name for f in dataclasses.fields(Phase)]
    for pid, rows in by_plan.items():
        rows.sort(key=lambda r: r["phase"])
        words: list[dict[str, Any]] = [
            {w: r[w] for w in phase_words}
            | {p: tuple(r[p]) for p in _OF_PHASES}
            | {"step": Step(**r["step"]) if r["step"] else None}
            | {p: tuple(tuple(pair.values()) for pair in r[p]) for p in ("levels", "again")}
            for r in rows
        ]
        phases = tuple(Phase(**w) for w in words)
        r = rows[0]
        plans[pid] = Plan(
            phases=phases,
            **{p: tuple(r[p]) for p in _PATTERNS if p not in _OF_PHASES},
            index=tuple(Window(**w) for w in r["index"]),
            model=tuple(json.loads(r["model"]).items()),
            weight=r["weight"],
        )
        predicted |= {(pid, x["phase"]): Parts(**{k: x[k] for k in KINDS}) for x in rows}
    return plans, predicted
