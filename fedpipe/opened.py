"""A run's files opened for rounds: what `train`, `aggregate`, `segment` and `evaluate` read and write alike."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fedpipe import io, machine
from fedpipe.config import Run
from fedpipe.data import dataset
from fedpipe.evaluation import pooled
from fedpipe.plans import read_plans
from fedpipe.rounds import Rounds, Rows, Sent, World
from fedpipe.route import needed_states
from fedpipe.runtime import Runtime
from fedpipe.states import write_owns, write_states
from fedpipe.steps import provenance

METRICS = pa.schema(
    [("round", pa.int32()), ("client", pa.int32()), ("part", pa.string()), ("plan", pa.string()), ("phase", pa.int32())]
    + [("steps", pa.int32()), ("loss_first", pa.float64()), ("loss_last", pa.float64()), ("samples", pa.int32())]
    + [("weight", pa.float64()), ("payload_up", pa.int64()), ("header_up", pa.int64())]
    + [("payload_down", pa.int64()), ("header_down", pa.int64()), ("failed", pa.bool_())]
)
CURVE = pa.schema([("round", pa.int32()), ("loss", pa.float64()), ("accuracy", pa.float64()), ("samples", pa.int32())])
TIMES = pa.schema([("round", pa.int32()), ("seconds", pa.float64()), ("host", pa.string()), ("date", pa.string())])
PEAKS = pa.schema(
    [("round", pa.int32()), ("client", pa.int32()), ("plan", pa.string()), ("phase", pa.int32())]
    + [("predicted", pa.int64()), ("measured", pa.int64()), ("budget", pa.int64())]
)


class Opened:
    """The assigned run and its data. States carry one key, whatever way of running made them."""

    def __init__(self, run: Run, data: Path, partition: Path, plans: Path, route: Path):
        self.run = run
        self.rt = Runtime(run, dataset.load(data))
        table = io.read_table(plans)
        self.route = io.read_table(route).to_pylist()
        self.plans, predicted = read_plans(table)
        shares = io.read_table(partition)
        self.training = rows_by_client(shares, "train")
        self.testing = rows_by_client(shares, "test")
        budgets = {r["client"]: r["budget"] for r in self.route if r["kind"] == "train"}
        self.rounds = Rounds(self.rt, self.plans, predicted, self.route, self.training, budgets)
        self.planned = io.table_meta(table)
        made = provenance("segment", run, [data, partition, plans, route])
        self.meta = {**made, "step": "rounds", **{k: self.planned[k] for k in ("method", "label", "seed")}}
        self.meta["platform"] = machine.describe(run)
        machine.check(run, self.planned["platform"])
        self.log_rows: Rows = []
        self.seconds: Rows = []

    def needed(self, t: int) -> set[str]:
        return needed_states(self.route, t)

    def log(self, sent: list[Sent]) -> None:
        self.log_rows += [m for s in sorted(sent, key=lambda s: (s.row["client"], s.row["part"])) for m in s.metrics]

    @contextmanager
    def timed(self, t: int) -> Iterator[None]:
        """Note the seconds of round t: an observation, read by nothing that decides."""
        begin = time.perf_counter()
        yield
        seen = {"host": socket.gethostname(), "date": date.today().isoformat()}
        self.seconds.append({"round": t, "seconds": time.perf_counter() - begin, **seen})

    def round(self, t: int, world: World) -> World:
        """One whole round: every group trained, every state mixed."""
        sent = self.rounds.train(t, world, self.rounds.groups(t))
        self.log(sent)
        return self.rounds.mix(t, world, sent)

    def point(self, t: int, world: World) -> dict[str, Any]:
        """A point of the test curve: mean over the nodes' newest states of loss and accuracy on all test rows."""
        rows = torch.cat(list(self.testing.values())).sort().values
        newest: dict[str, str] = {n.split("@")[0]: n for n in sorted(world.states, key=_version)}
        found = np.mean([pooled(self.rt, world.states[n], rows) for n in sorted(newest.values())], axis=0)
        return {"round": t, "loss": float(found[0]), "accuracy": float(found[1]), "samples": len(rows)}

    def write_world(self, state: Path, own: Path, world: World, t: int) -> None:
        keep = needed_states(self.route, t)
        write_states(state, {n: s for n, s in world.states.items() if n in keep}, t, self.meta)
        write_owns(own, world.owns, self.meta)

    def write_metrics(self, rounds: Path, curve: Path, points: Rows) -> None:
        # Observations first: with the results there, the step counts as done.
        io.write_table(rounds.with_suffix(".obs.parquet"), self.seconds, self.meta, TIMES)
        if self.rounds.peaks:
            io.write_table(rounds.with_suffix(".peaks.obs.parquet"), self.rounds.peaks, self.meta, PEAKS)
        io.write_table(rounds, self.log_rows, self.meta, METRICS)
        io.write_table(curve, points, self.meta, CURVE)


def _version(name: str) -> int:
    return int(name.split("@")[1])


def rows_by_client(shares: pa.Table, split: str) -> dict[int, Tensor]:
    """Rows of the data [n] of each client in one split, ascending; clients without any have an empty tensor."""
    client = shares["client"].to_numpy()
    rows, chosen = shares["row"].to_numpy(), shares["split"].to_numpy(zero_copy_only=False) == split
    order = np.lexsort((rows[chosen], client[chosen]))
    clients = np.unique(client)
    parts = np.split(rows[chosen][order], np.searchsorted(client[chosen][order], clients[1:]))
    return {int(c): torch.from_numpy(p.astype(np.int64)) for c, p in zip(clients, parts, strict=True)}
