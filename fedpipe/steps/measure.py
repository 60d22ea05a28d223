"""Step measure: predicted bytes of the plans a method asks for at each budget, checked by two real batches."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from fedpipe import io
from fedpipe.config import Run
from fedpipe.data import dataset
from fedpipe.errors import FedpipeError
from fedpipe.memory import limit, trial
from fedpipe.memory.enforce import row_of
from fedpipe.memory.keep import keeping
from fedpipe.memory.margin import with_margin
from fedpipe.memory.measure import BESIDE
from fedpipe.memory.parts import KINDS, mib
from fedpipe.memory.predict import tensor_bytes
from fedpipe.memory.predictor import candidate
from fedpipe.runtime import Runtime
from fedpipe.steps import provenance
from fedpipe.studyfile import load_run
from fedpipe.types import Method, Plan, Row

SCHEMA = pa.schema(
    [("kind", pa.string()), ("candidate", pa.string()), ("width", pa.float64()), ("peak", pa.int64())]
    + [(k, pa.int64()) for k in KINDS]
    + [("first", pa.string()), ("last", pa.string()), ("level", pa.int32())]  # no level: each unit runs again
)
OBS = pa.schema(
    [("budget", pa.int64()), ("candidate", pa.string()), ("predicted", pa.int64()), ("measured", pa.int64())]
    + [(b, pa.int64()) for b in BESIDE]
)


def run(run: Path, data: Path, *, prediction: Path, tried: Path) -> None:
    """Write the bytes of every candidate plan the method looks at, of every range of units where it chooses among them,
    and of the widths budgets are named after.

    Raises FedpipeError when a candidate, run for real, needs more than its prediction plus the study's margin; with
    `budget: warn` that is a line on standard error.
    """
    spec = load_run(run)
    rt = Runtime(spec, dataset.load(data))
    limits = [b for b, n in spec.budgets.limits(spec.data.partition.clients) if n]
    needs = widths_bytes(rt, sorted({w for b in limits for w in b.widths}))
    given: list[tuple[int | None, float | None]] = [*sorted({b.resolve(needs) for b in limits})]
    observed = []
    for budget, ratio in given or [(None, None)]:
        row = row_of({"budget": budget, "ratio": ratio}, spec.local.batch, spec.budget)
        plan, _ = make_plan(rt, row, 0)
        if plan is not None:
            _stacks(rt, plan)
            observed.append(_try(rt, spec, plan, budget))
    rows: list[dict[str, Any]] = [
        {"kind": "candidate", "candidate": name, "peak": parts.peak, **asdict(parts)}
        for name, parts in sorted(rt.predictor.known.items())
    ]
    rows += [{"kind": "budget", "width": w, "peak": p} for w, p in needs.items()]
    rows += [
        {"kind": "range", "first": first, "last": last, "level": level, "peak": peak}
        for (first, last), peaks in rt.predictor.ranges.items()
        for level, peak in peaks.items()
    ]
    made = provenance("measure", spec, [data])
    io.write_table(tried, observed, made, OBS)
    io.write_table(prediction, rows, made, SCHEMA)


def _stacks(rt: Runtime, plan: Plan) -> None:
    """Raise FedpipeError when a stack of a plan's clients needs more memory than the device has."""
    size = min(rt.stack_size, rt.run.cohort)
    placed = tensor_bytes(rt.state0.values()) if rt.device.type == "cuda" else 0  # an arena beside what is handed over
    needs, has = size * (max(rt.predictor.peaks(plan)) + placed), limit.total(rt.device)
    if size > 1 and needs > has:
        raise FedpipeError(
            f"measure: a stack of {size} clients of method {rt.method.name} needs {mib(needs)}, this device has "
            f"{mib(has)}; lower stack, the number of clients that are trained as one"
        )


def make_plan(rt: Runtime, row: Row, round: int, largest: int = 0) -> tuple[Plan | None, int | None]:
    """The method's plan for a row (by default the whole model, if it fits), and without one the bytes it would need.

    largest: samples of the largest client with this row's budget; 0: the row's own.
    """
    ctx = rt.plan_ctx(row, round if rt.method.by_round else None)
    plan = rt.method.plan(ctx) if rt.method.plan else ctx.if_fits(Plan())
    if plan is None:
        return None, min(ctx.refused, default=None)
    return keeping(rt, rt.levelled(plan), row, max(largest, row.samples)), None


def widths_bytes(rt: Runtime, widths: list[float]) -> dict[float, int]:
    """What training the model of each width needs: the predicted peak of plain local training, plus the margin."""
    plain = Runtime(rt.run, rt.data, Method()) if widths else rt
    builds = {w: (("width", w),) if w != 1 else () for w in widths}
    plans = {w: Plan(index=plain.windows(build), model=build) for w, build in builds.items()}
    return {w: with_margin(max(plain.predictor.peaks(plan)), rt.run.margin) for w, plan in plans.items()}


def _try(rt: Runtime, spec: Run, plan: Plan, budget: int | None) -> dict[str, Any]:
    peaks = rt.predictor.peaks(plan)
    phase = max(range(len(peaks)), key=peaks.__getitem__)
    nearest = replace(plan, phases=(plan.phases[phase],))
    rows = torch.from_numpy((~rt.data.test).nonzero()[0][: spec.local.batch])
    (measured,) = trial.tried(rt, nearest, rows)
    peak, allowed = measured.bytes, with_margin(peaks[phase], spec.margin)
    if len(rows) == spec.local.batch and peak > allowed and spec.budget != "off":
        said = (
            f"measure: phase {plan.phases[phase].name} of method {rt.method.name} needs {mib(peak)} on this device, "
            f"predicted {mib(peaks[phase])} and {spec.margin:.0%} margin"
        )
        if spec.budget == "enforce":
            raise FedpipeError(f"{said}; raise margin, or budget: warn goes on")
        print(f"fedpipe: {said}; going on", file=sys.stderr, flush=True)
    made = {"budget": budget, "candidate": candidate(nearest), "predicted": peaks[phase], "measured": peak}
    return made | measured.beside
