"""The output of units that no longer change, made once per phase and kept instead of being run for every batch.

It is the same to the last bit where a batch keeps its members (`local.batches: fixed`). Where batches are drawn anew,
single rows are kept; that needs units in which rows do not influence each other.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpipe.types import Batch, Phase, Tensors

if TYPE_CHECKING:
    from fedpipe.client import Client
    from fedpipe.models.chain import Chain

Rows = NDArray[np.int64]


def laid(batch: Batch, layout: torch.memory_format) -> Batch:
    """A batch whose x, if images, lies in a layout."""
    x = batch.get("x")
    return batch if x is None or x.ndim != 4 else {**batch, "x": x.contiguous(memory_format=layout)}


class Kept:
    """What clients of one stack have kept: batches whose x is the output of `unit`; nothing at first.

    fixed: whether the batches of a client have the same members all through a round.
    """

    def __init__(self, chain: "Chain", layout: torch.memory_format, fixed: bool):
        self.chain, self.layout, self.fixed = chain, layout, fixed
        self.unit: str | None = None
        self.batches: list[dict[bytes, Batch]] = []
        self.place: list[dict[int, tuple[bytes, int]]] = []  # of a row: its batch, and where in it

    def sizes(self) -> Tensors:
        """Tensors without memory, as large as all that is kept: it must go when it is not kept any more."""
        return {
            f"kept/{i}/{j}/{k}": t.to("meta")
            for i, mine in enumerate(self.batches)
            for j, batch in enumerate(mine.values())
            for k, t in batch.items()
        }

    @torch.no_grad()
    def make(self, phase: Phase, at: Tensors, clients: "list[Client]", rows: list[list[Rows]]) -> None:
        """Bring what is kept to the output of `phase.since`, from what is kept now where that is on the way."""
        if phase.since is None:
            self.unit, self.batches, self.place = None, [], []
            return
        if self.unit == phase.since:
            return
        names = self.chain.names
        start = self.unit if self.unit and names.index(self.unit) < names.index(phase.since) else None
        wanted = [_distinct(r, self.fixed) for r in rows]
        if start is None or any(mine.keys() != kept.keys() for mine, kept in zip(wanted, self.batches, strict=True)):
            start, self.batches = None, [{} for _ in clients]
        self.chain.train()
        for i, (client, mine) in enumerate(zip(clients, wanted, strict=True)):
            own = at if len(clients) == 1 else {n: t[i] for n, t in at.items()}
            values = {n: own[f"model/{n}"] for n in self.chain.tensor_names}
            for key, members in mine.items():
                batch = self.batches[i].pop(key) if start else laid(client.load(members, len(members)), self.layout)
                self.batches[i][key] = {**batch, "x": self._run(values, batch["x"], start, phase.since)}
        self.unit = phase.since
        self.place = [{int(r): (k, j) for k, m in mine.items() for j, r in enumerate(m)} for mine in wanted]

    def _run(self, values: Tensors, x: Tensor, start: str | None, end: str) -> Tensor:
        words: dict[str, Any] = {"upto": end, "since": start, "head": False}
        out: Tensor = torch.func.functional_call(self.chain, values, (x,), words)
        return out

    def load(self, rows: list[Rows], size: int) -> Batch:
        """The batches of these rows, with a client axis where there are several clients."""
        each = [self._one(i, r, size) for i, r in enumerate(rows)]
        return each[0] if len(each) == 1 else {k: torch.stack([b[k] for b in each]) for k in each[0]}

    def _one(self, i: int, rows: Rows, size: int) -> Batch:
        kept = self.batches[i].get(rows.tobytes()) if self.fixed else None
        if kept is not None and len(rows) == size:
            return kept
        padded = rows if len(rows) == size else np.pad(rows, (0, size - len(rows)), mode="edge")
        found = [self.place[i][int(r)] for r in padded]
        x, y = (torch.stack([self.batches[i][k][name][j] for k, j in found]) for name in ("x", "y"))
        w = torch.zeros_like(next(iter(self.batches[i].values()))["w"][:1]).repeat(size)
        w[: len(rows)] = 1 / len(rows)
        return {"x": x, "y": y, "w": w}


def _distinct(rows: list[Rows], fixed: bool) -> dict[bytes, Rows]:
    """Batches to keep, by their members: those of the phase, or, where rows are kept, all rows in ascending order."""
    if fixed:
        return {r.tobytes(): r for r in rows}
    size = max(len(r) for r in rows)
    every = np.unique(np.concatenate(rows))
    return {part.tobytes(): part for part in (every[i : i + size] for i in range(0, len(every), size))}
