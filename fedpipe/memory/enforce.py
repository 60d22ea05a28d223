"""Enforcement: predicted peaks of plans, and measured peaks of clients, against their budgets.

The study's `budget` says what follows: an error (`enforce`), one line and marked cells (`warn`), nothing (`off`).
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from fedpipe.errors import FedpipeError
from fedpipe.memory.limit import allocator_limit
from fedpipe.memory.margin import with_margin
from fedpipe.memory.measure import Peak
from fedpipe.memory.parts import Parts, mib
from fedpipe.memory.predict import tensor_bytes
from fedpipe.types import Row, Tensors


def row_of(person: Mapping[str, Any], samples: int, how: str) -> Row:
    """What a client's plan is made from, given its `budget` (bytes) and `ratio`: without a limit where `how` is off."""
    return Row(budget=None if how == "off" else person["budget"], samples=samples, ratio=person["ratio"])


@dataclass(frozen=True)
class Over:
    """A phase of a plan whose predicted peak and margin are over the budgets of clients who were given it."""

    clients: tuple[int, ...]
    plan: str
    phase: int  # from 0
    phases: int
    budgets: tuple[int, ...]
    parts: Parts
    margin: float

    @property
    def excess(self) -> float:
        return with_margin(self.parts.peak, self.margin) / self.budgets[0] - 1

    def __str__(self) -> str:
        phase, whose = f"phase {self.phase + 1} of {self.phases}", "their" if len(self.clients) > 1 else "its"
        verb = f"and {self.margin:.0%} margin are" if self.margin else "is"
        return (
            f"{_clients(self.clients)}: predicted peak {mib(self.parts.peak)} of {phase}"
            f" ({self.parts.largest}) {verb} over {whose} budget{'s' if len(self.budgets) > 1 else ''}"
            f" of {', '.join(map(mib, self.budgets))}"
        )


def plans_over(
    given: Iterable[tuple[int, str | None, int | None]], parts: Callable[[str], list[Parts]], margin: float
) -> list[Over]:
    """Every phase of a plan that is over the budget of a client it is given to. given: (client, plan, budget)."""
    owners: dict[str, dict[int, int]] = {}
    for client, plan, budget in given:
        if plan is not None and budget is not None:
            owners.setdefault(plan, {})[client] = budget
    out = []
    for plan, budgets in owners.items():
        phases = parts(plan)
        for i, p in enumerate(phases):
            needs = with_margin(p.peak, margin)
            if who := tuple(sorted(c for c, b in budgets.items() if b < needs)):
                limits = tuple(sorted({budgets[c] for c in who}))
                out.append(Over(who, plan, i, len(phases), limits, p, margin))
    return out


def judge_plans(found: list[Over], how: str, on: str) -> set[tuple[int, str]]:
    """Raise FedpipeError for the phase that is over by most (`enforce`), or say each in a line: `warn` goes on, and a
    study that drops clients that fail (`on`) drops them. Returns who is dropped, and from which plan."""
    drop = how == "enforce" and on == "drop"
    if found and how == "enforce" and not drop:
        worst = max(found, key=lambda o: o.excess)
        more = f" (and {len(found) - 1} more of the plans' phases are over)" if len(found) > 1 else ""
        raise FedpipeError(f"{worst}{more}; budget: warn goes on and marks the cells")
    for over in found if how != "off" else ():
        print(f"fedpipe: {over}; {'dropped' if drop else 'going on'}", file=sys.stderr, flush=True)
    return {(client, over.plan) for over in found for client in over.clients} if drop else set()


class Witness:
    """Measures each phase of one client's training, as far as it comes; `over` judges the measured peaks.

    On CUDA, under `enforce`, the allocator refuses what goes far beyond the budget: the same FedpipeError, at once.
    """

    def __init__(
        self, row: Mapping[str, Any], predicted: list[Parts], budget: int | None, device: torch.device, how: str
    ):
        self.client, self.round, self.plan = row["client"], row["round"], row["plan"]
        self.kind = "witness" if row["witness"] else "own"  # whether it stands for all clients of its plan
        self.predicted, self.budget, self.device, self.how = predicted, budget, device, how
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def phase(self, index: int, held: Tensors) -> Iterator[None]:
        peak, limited = Peak(held.values(), self.device), False
        try:
            with peak:
                if self.budget is None or self.how != "enforce":
                    yield
                else:
                    with allocator_limit(max(0, self.budget - tensor_bytes(held.values())), self.device) as limited:
                        yield
        except torch.OutOfMemoryError as e:
            if not limited:
                raise
            raise FedpipeError(self._said(index, peak.bytes, ", and more was asked for,")) from e
        self.rows.append(
            {"round": self.round, "client": self.client, "plan": self.plan, "phase": index}
            | {
                "kind": self.kind,
                "predicted": self.predicted[index].peak,
                "measured": peak.bytes,
                "budget": self.budget,
            }
            | peak.beside
        )

    def over(self) -> dict[int, str]:
        """What to say of each phase whose measured peak is over the budget; nothing where budgets are off."""
        if self.budget is None or self.how == "off":
            return {}
        return {r["phase"]: self._said(r["phase"], r["measured"]) for r in self.rows if r["measured"] > self.budget}

    def _said(self, index: int, measured: int, more: str = "") -> str:
        parts, count = self.predicted[index], len(self.predicted)
        return (
            f"measured peak {mib(measured)} of phase {index + 1} of {count}{more} is over its budget of "
            f"{mib(self.budget)} (predicted {mib(parts.peak)}: {parts.largest})"
        )


def _clients(ids: tuple[int, ...]) -> str:
    """`client 3`, `clients 0-9, 12`."""
    runs = [[i for _, i in g] for _, g in groupby(enumerate(ids), key=lambda p: p[1] - p[0])]
    said = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return f"client{'s' if len(ids) > 1 else ''} {said}"
