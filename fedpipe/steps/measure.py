"""Step measure: predicted bytes of the plans a method asks for at each budget, checked by two real batches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from fedpipe import io
from fedpipe.config import Run
from fedpipe.context import with_margin
from fedpipe.data import dataset
from fedpipe.errors import FedpipeError
from fedpipe.memory.enforce import mib
from fedpipe.memory.measure import Peak
from fedpipe.memory.predictor import STEPS, candidate
from fedpipe.runtime import Runtime
from fedpipe.steps import provenance
from fedpipe.studyfile import load_run
from fedpipe.types import Method, Plan, Row

SCHEMA = pa.schema(
    [("kind", pa.string()), ("candidate", pa.string()), ("width", pa.float64()), ("peak", pa.int64())]
)  # fmt: skip
OBS = pa.schema(
    [("budget", pa.int64()), ("candidate", pa.string()), ("predicted", pa.int64()), ("measured", pa.int64())]
)


def run(run: Path, data: Path, *, prediction: Path, tried: Path) -> None:
    """Write the bytes of every candidate plan the method looks at, and of the widths budgets are named after.

    Raises FedpipeError when a candidate, run for real, needs more than its prediction plus the study's margin.
    """
    spec = load_run(run)
    rt = Runtime(spec, dataset.load(data))
    widths = {w: width_bytes(rt, w) for w in spec.budgets.like_width or {}}
    budgets: list[int | None] = [*sorted({*(spec.budgets.bytes or {}), *widths.values()})] or [None]
    observed = []
    for budget in budgets:
        plan, _ = make_plan(rt, Row(budget=budget, samples=spec.local.batch), 0)
        if plan is not None:
            observed.append(_try(rt, spec, plan, budget))
    rows: list[dict[str, Any]] = [
        {"kind": "candidate", "candidate": c, "peak": p} for c, p in sorted(rt.predictor.known.items())
    ]
    rows += [{"kind": "budget", "width": w, "peak": p} for w, p in widths.items()]
    made = provenance("measure", spec, [data])
    io.write_table(tried, observed, made, OBS)
    io.write_table(prediction, rows, made, SCHEMA)


def make_plan(rt: Runtime, row: Row, round: int) -> tuple[Plan | None, int | None]:
    """The method's plan for a row (by default the whole model, if it fits), and without one the bytes it would need."""
    ctx = rt.plan_ctx(row, round if rt.method.by_round else None)
    plan = rt.method.plan(ctx) if rt.method.plan else ctx.if_fits(Plan())
    if plan is None:
        return None, ctx.refused[-1] if ctx.refused else None
    return rt.levelled(plan), None


def width_bytes(rt: Runtime, width: float) -> int:
    """What training the width-r model needs: the predicted peak of plain local training, plus the margin."""
    build = (("width", width),) if width != 1 else ()
    plan = Plan(index=rt.windows(build), model=build)
    plain = Runtime(rt.run, rt.data, Method())
    return with_margin(max(plain.predictor.peaks(plan)), rt.run.margin)


def _try(rt: Runtime, spec: Run, plan: Plan, budget: int | None) -> dict[str, Any]:
    peaks = rt.predictor.peaks(plan)
    phase = max(range(len(peaks)), key=peaks.__getitem__)
    nearest = replace(plan, phases=(plan.phases[phase],))
    rows = torch.from_numpy((~rt.data.test).nonzero()[0][: spec.local.batch])
    received = rt.received(nearest, rt.state0)
    client = rt.client(rt.ctx(client=0), received, rows)
    client.batches = lambda phase, index: [rows] * STEPS
    measured: list[Peak] = []

    def probe(index: int, held: list[torch.Tensor]) -> Peak:
        measured.append(Peak(held, rt.device))
        return measured[-1]

    rt.loop(probe).train([client], nearest)
    peak, allowed = measured[0].bytes, with_margin(peaks[phase], spec.margin)
    if len(rows) == spec.local.batch and peak > allowed:
        raise FedpipeError(
            f"measure: phase {plan.phases[phase].name} of method {rt.method.name} needs {mib(peak)} on this device, "
            f"predicted {mib(peaks[phase])} and {spec.margin:.0%} margin; raise margin"
        )
    return {"budget": budget, "candidate": candidate(nearest), "predicted": peaks[phase], "measured": peak}
