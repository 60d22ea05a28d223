"""The output of units that no longer change, made once per phase and kept instead of being run for every batch.

It is the same to the last bit where a batch keeps its members (`local.batches: fixed`); in a stack, within rounding.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpipe.types import Batch, Phase, Tensors

if TYPE_CHECKING:
    from fedpipe.loop.client import Client
    from fedpipe.models.chain import Chain

Rows = NDArray[np.int64]


def laid(batch: Batch, layout: torch.memory_format) -> Batch:
    """A batch whose x, if images, lies in a layout."""
    x = batch.get("x")
    return batch if x is None or x.ndim != 4 else {**batch, "x": x.contiguous(memory_format=layout)}


class Kept:
    """What clients of one stack have kept: by their rows, batches whose x is the output of `unit`; nothing at first."""

    def __init__(self, chain: "Chain", layout: torch.memory_format):
        self.chain, self.layout = chain, layout
        self.unit: str | None = None
        self.batches: list[dict[bytes, Batch]] = []

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
            self.unit, self.batches = None, []
            return
        wanted = [{r.tobytes(): r for r in mine} for mine in rows]
        place, had = self.chain.names.index, self.unit
        same = [mine.keys() for mine in wanted] == [mine.keys() for mine in self.batches]
        if same and had == phase.since:
            return
        start = had if same and had and place(had) < place(phase.since) else None
        if start is None:
            self.batches = [{} for _ in clients]
        self.chain.train()
        for i, (client, mine) in enumerate(zip(clients, wanted, strict=True)):
            own = at if len(clients) == 1 else {n: t[i] for n, t in at.items()}
            values = {n: own[f"model/{n}"] for n in self.chain.tensor_names}
            for key, members in mine.items():
                batch = self.batches[i].pop(key) if start else laid(client.load(members, len(members)), self.layout)
                self.batches[i][key] = {**batch, "x": self._run(values, batch["x"], start, phase.since)}
        self.unit = phase.since

    def _run(self, values: Tensors, x: Tensor, start: str | None, end: str) -> Tensor:
        words: dict[str, Any] = {"upto": end, "since": start, "head": False}
        out: Tensor = torch.func.functional_call(self.chain, values, (x,), words)
        return out

    def load(self, rows: list[Rows], size: int) -> Batch:
        """The batches of these rows, with a client axis where there are several clients."""
        each = [self._one(i, r, size) for i, r in enumerate(rows)]
        return each[0] if len(each) == 1 else {k: torch.stack([b[k] for b in each]) for k in each[0]}

    def _one(self, i: int, rows: Rows, size: int) -> Batch:
        kept, n = self.batches[i][rows.tobytes()], len(rows)
        if n == size:
            return kept
        padded = {k: torch.cat([t, t[-1:].expand(size - n, *t.shape[1:])]) for k, t in kept.items()}
        padded["w"][n:] = 0
        return padded
