"""Enforcement: a witness's measured peak against its budget, phase by phase."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedpipe.memory.measure import Peak


def mib(count: int | None) -> str:
    return "no limit" if count is None else f"{count / 2**20:.2f} MiB"


class Witness:
    """Measures each phase of one client's training, as far as it comes; `over` judges the measured peaks."""

    def __init__(self, row: dict[str, Any], predicted: list[int], budget: int | None, device: torch.device):
        self.client, self.round, self.plan = row["client"], row["round"], row["plan"]
        self.predicted, self.budget, self.device = predicted, budget, device
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def phase(self, index: int, held: list[Tensor]) -> Iterator[None]:
        with Peak(held, self.device) as peak:
            yield
        self.rows.append(
            {"round": self.round, "client": self.client, "plan": self.plan, "phase": index}
            | {"predicted": self.predicted[index], "measured": peak.bytes, "budget": self.budget}
        )

    def over(self) -> str | None:
        """What to say of the first phase whose measured peak is over the budget."""
        for r in self.rows:
            if self.budget is not None and r["measured"] > self.budget:
                return (
                    f"measured peak {mib(r['measured'])} of phase {r['phase']} is over its budget of "
                    f"{mib(self.budget)} (predicted {mib(r['predicted'])}); raise margin"
                )
        return None
