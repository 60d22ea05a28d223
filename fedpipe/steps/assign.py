"""Step assign: who holds, trains and sends what, as files, before anything is trained; and state 0."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from fedpipe import io, machine
from fedpipe.budgets import Limit
from fedpipe.context import RouteCtx
from fedpipe.data import dataset
from fedpipe.errors import FedpipeError
from fedpipe.memory.enforce import judge_plans, plans_over, row_of
from fedpipe.memory.margin import with_margin
from fedpipe.memory.parts import Parts, mib
from fedpipe.plans import SCHEMA as PLANS
from fedpipe.plans import key, plan_rows
from fedpipe.route import SCHEMA as ROUTE
from fedpipe.route import schedule, star, thinned
from fedpipe.runtime import Runtime
from fedpipe.states import write_owns, write_states
from fedpipe.steps import provenance
from fedpipe.steps.measure import make_plan
from fedpipe.studyfile import load_run
from fedpipe.types import Plan, Row

ASSIGNMENT = pa.schema(
    [("client", pa.int32()), ("round", pa.int32()), ("plan", pa.string()), ("budget", pa.int64())]
    + [("ratio", pa.float64()), ("name", pa.string()), ("group", pa.int32()), ("samples", pa.int32())]
    + [("predicted", pa.int64()), ("needs", pa.int64())]
)


def run(
    run: Path, data: Path, clients: Path, prediction: Path,
    *, plans: Path, assignment: Path, route: Path, state: Path, own: Path,
) -> None:  # fmt: skip
    """Write plans, assignment, route, state 0 and an empty own folder.

    Raises FedpipeError when no client can take part, and under `budget: enforce` for a plan over its budget, unless the
    study drops clients that fail: then those who were given it take no part.
    """
    spec = load_run(run)
    rt = Runtime(spec, dataset.load(data))
    people = _people(clients, rt.predictor.remember(io.read_table(prediction)))
    chosen = _Plans(rt, people)
    stages = [chosen.stages(p) for p in people]
    given = ((p["client"], pid, p["budget"]) for p, mine in zip(people, stages, strict=True) for _, pid in mine)
    over = plans_over(given, chosen.parts, spec.margin)
    dropped = judge_plans(over, spec.budget, spec.on_client_failure)
    stages = [chosen.without(p, mine, dropped) for p, mine in zip(people, stages, strict=True)]
    if not any(pid for mine in stages for _, pid in mine):
        raise FedpipeError(_nobody(rt, people, chosen))
    by_client = {p["client"]: (p, s) for p, s in zip(people, stages, strict=True)}
    rows = schedule(
        thinned((rt.method.route or star)(_route_ctx(rt, len(people))), spec),
        plan_of=lambda client, round: _at(by_client[client][1], round),
        plans=chosen.plans,
        stack_key=lambda client, plan: rt.stack_key(by_client[client][0]["samples"], chosen.plans[plan]),
        stack_size=rt.stack_size,
        full_batch=lambda client: by_client[client][0]["samples"] >= spec.local.batch,
    )
    for r in rows:
        r["budget"] = by_client[r["client"]][0]["budget"] if r["kind"] == "train" else None
    names, tensors = rt.build().names, rt.build().tensor_names
    made = provenance("assign", spec, [data, clients, prediction])
    meta = {
        **made,
        "method": spec.method.name,
        "label": spec.label,
        "seed": spec.seed,
        "platform": machine.describe(spec),
    }
    io.write_table(plans, plan_rows(chosen.plans, rt.predictor.parts, names, tensors), {**meta, "units": names}, PLANS)
    io.write_table(assignment, _assignment(people, stages, chosen), meta, ASSIGNMENT)
    first = {"server@0": rt.state0}
    io.write_table(route, rows, {**meta, "holds": {"state": [f"{n}.safetensors" for n in first], "own": []}}, ROUTE)
    write_states(state, first, 0, meta)
    write_owns(own, {}, meta)


def _route_ctx(rt: Runtime, clients: int) -> RouteCtx:
    return RouteCtx(rt.run.seed, rt.run.rounds, clients, rt.run.cohort, rt.method.h)


def _people(clients: Path, needs: dict[float, int]) -> list[dict[str, Any]]:
    """Rows of `clients.parquet`, with budget (bytes) and ratio as the predicted bytes of widths have them."""
    people = io.read_table(clients).to_pylist()
    for p in people:
        limit = Limit(p["kind"], p["value"], p["name"]) if p["kind"] else None
        p["budget"], p["ratio"] = limit.resolve(needs) if limit else (None, None)
    return people


def _nobody(rt: Runtime, people: list[dict[str, Any]], chosen: "_Plans") -> str:
    least = min((n for n in chosen.needs.values() if n is not None), default=None)
    if least is None:
        return f"method {rt.method.name} gives no client a plan"
    largest = mib(max(p["budget"] for p in people))
    return f"budgets: none is enough for method {rt.method.name}; it needs {mib(least)}, the largest is {largest}"


class _Plans:
    """Distinct plans in order of first use, by the row they were made from."""

    def __init__(self, rt: Runtime, people: list[dict[str, Any]]):
        self.rt = rt
        self.largest: dict[int | None, int] = {}  # samples of the largest client, by budget
        for row in map(self.row, people):
            self.largest[row.budget] = max(row.samples, self.largest.get(row.budget, 0))
        self.plans: dict[str, Plan] = {}
        self.names: dict[str, str] = {}
        self.needs: dict[tuple[Row, int], int | None] = {}
        self.made: dict[tuple[Row, int], str | None] = {}

    def row(self, person: dict[str, Any]) -> Row:
        return row_of(person, person["samples"], self.rt.run.budget)

    def parts(self, pid: str) -> list[Parts]:
        return self.rt.predictor.parts(self.plans[pid])

    def stages(self, person: dict[str, Any]) -> list[tuple[int, str | None]]:
        """(first round, plan) of a client: one stage, unless the method's plans change with the round."""
        row = self.row(person)
        out: list[tuple[int, str | None]] = []
        for t in range(self.rt.run.rounds if self.rt.method.by_round else 1):
            plan = self._make(row, t)
            if not out or out[-1][1] != plan:
                out.append((t, plan))
        return out

    def without(
        self, person: dict[str, Any], stages: list[tuple[int, str | None]], dropped: set[tuple[int, str]]
    ) -> list[tuple[int, str | None]]:
        """A client's stages without the plans (client, plan) that it was found not to hold."""
        out: list[tuple[int, str | None]] = []
        for first, pid in stages:
            if pid is not None and (person["client"], pid) in dropped:
                most = max(parts.peak for parts in self.parts(pid))
                self.needs[self.row(person), first] = with_margin(most, self.rt.run.margin)
                pid = None
            out.append((first, pid))
        return out

    def _make(self, row: Row, round: int) -> str | None:
        if (row, round) not in self.made:
            plan, needs = make_plan(self.rt, row, round, self.largest[row.budget])
            pid = self.names.setdefault(key(plan), f"p{len(self.names)}") if plan else None
            if plan and pid:
                self.plans[pid] = plan
            self.needs[row, round] = needs
            self.made[row, round] = pid
        return self.made[row, round]


def _at(stages: list[tuple[int, str | None]], round: int) -> str | None:
    return next(plan for first, plan in reversed(stages) if first <= round)


def _assignment(
    people: list[dict[str, Any]], stages: list[list[tuple[int, str | None]]], chosen: _Plans
) -> list[dict[str, Any]]:
    rows = []
    for p, mine in zip(people, stages, strict=True):
        for first, pid in mine:
            needs = None if pid else chosen.needs[chosen.row(p), first]
            predicted = max(parts.peak for parts in chosen.parts(pid)) if pid else None
            rows.append(
                {k: p[k] for k in ("client", "budget", "ratio", "name", "group", "samples")}
                | {"round": first, "plan": pid, "predicted": predicted, "needs": needs}
            )
    return rows
