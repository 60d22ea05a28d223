"""A run's files opened for rounds: what `train`, `aggregate`, `segment` and `evaluate` read and write alike."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fedpipe import io, machine
from fedpipe.arrow import numbers
from fedpipe.config import Run
from fedpipe.data import dataset
from fedpipe.evaluation import pooled
from fedpipe.folding import played
from fedpipe.memory.measure import BESIDE
from fedpipe.plans import read_plans
from fedpipe.rounds import Rounds, Rows, Sent, World
from fedpipe.route import judged, needed_states
from fedpipe.runtime import Runtime
from fedpipe.states import Needs, write_owns, write_states
from fedpipe.steps import provenance
from fedpipe.stopping import look
from fedpipe.types import Tensors

METRICS = pa.schema(
    [("round", pa.int32()), ("client", pa.int32()), ("part", pa.string()), ("plan", pa.string()), ("phase", pa.int32())]
    + [("steps", pa.int32()), ("loss_first", pa.float64()), ("loss_last", pa.float64()), ("samples", pa.int32())]
    + [("weight", pa.float64()), ("payload_up", pa.int64()), ("header_up", pa.int64())]
    + [("payload_down", pa.int64()), ("header_down", pa.int64()), ("failed", pa.bool_())]
)
CURVE = pa.schema([("round", pa.int32()), ("loss", pa.float64()), ("accuracy", pa.float64()), ("samples", pa.int32())])
CURVE_VAL = pa.schema([*CURVE, ("val_loss", pa.float64()), ("val_accuracy", pa.float64()), ("val_samples", pa.int32())])
TIMES = pa.schema(
    [("round", pa.int32()), ("seconds", pa.float64()), ("captured", pa.float64())]
    + [("host", pa.string()), ("date", pa.string())]
)
PEAKS = pa.schema(
    [("round", pa.int32()), ("client", pa.int32()), ("plan", pa.string()), ("phase", pa.int32())]
    + [("kind", pa.string()), ("predicted", pa.int64()), ("measured", pa.int64()), ("budget", pa.int64())]
    + [(b, pa.int64()) for b in BESIDE]
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
        self.validation = rows_by_client(shares, "val")
        budgets = {r["client"]: r["budget"] for r in self.route if r["kind"] == "train"}
        self.rounds = Rounds(self.rt, self.plans, predicted, self.route, self.training, budgets)
        self.needs = Needs(self.route)
        self.planned = io.table_meta(table)
        made = provenance("segment", run, [data, partition, plans, route])
        self.meta = {**made, "step": "rounds", **{k: self.planned[k] for k in ("method", "label", "seed")}}
        self.meta["platform"] = machine.describe(run)
        machine.check(run, self.planned["platform"])
        self.host = socket.gethostname()
        self.log_rows: Rows = []
        self.seconds: Rows = []

    def still_needed(self, states: dict[str, Tensors], t: int) -> dict[str, Tensors]:
        """Those of the states of round t that rows of it or of later ones read, or that stand for the run."""
        return self.needs.among(states, t)

    def log(self, sent: list[Sent]) -> None:
        self.log_rows += [m for s in sorted(sent, key=lambda s: (s.row["client"], s.row["part"])) for m in s.metrics]

    @contextmanager
    def timed(self, t: int) -> Iterator[None]:
        """Note the seconds of round t, and how many of them steps were captured and compiled: an observation, read by
        nothing that decides."""
        begin, programs = time.perf_counter(), self.rt.programs
        before = programs.seconds
        yield
        seen = {"host": self.host, "date": date.today().isoformat()}
        self.seconds.append(
            {"round": t, "seconds": time.perf_counter() - begin, "captured": programs.seconds - before, **seen}
        )

    def groups(self, t: int, world: World) -> list[Rows]:
        """The stacked groups of a round; none once the run has stopped: its states are then handed on as they are."""
        return [] if world.watch.stopped is not None else self.rounds.groups(t)

    def round(self, t: int, world: World) -> World:
        """One whole round: every group trained, every state mixed."""
        world, sent = played(self.rounds, t, world, self.groups(t, world))
        self.log(sent)
        return world

    def evaluated(self, t: int, world: World) -> Rows:
        """The curve's point of state t, where it is due and the run goes on; the world then knows whether it stops."""
        if t not in self.run.evaluations or world.watch.stopped is not None:
            return []
        point = self.point(t, world)
        world.watch = look(world.watch, self.run, point)
        return [point]

    def point(self, t: int, world: World) -> dict[str, Any]:
        """A point of the curve: loss and accuracy on all test rows (and on all validation rows, where the study has
        some) of the server's newest state, or the mean over those of all nodes where there is no server."""
        newest = sorted(judged({n.split("@")[0]: n for n in sorted(world.states, key=_version)}))
        point: dict[str, Any] = {"round": t}
        train = torch.cat(list(self.training.values())).sort().values
        for prefix, shares in (("", self.testing), ("val_", self.validation)):
            rows = torch.cat(list(shares.values())).sort().values
            if prefix and not len(rows):
                continue
            found = np.mean([pooled(self.rt, world.states[n], rows, train) for n in newest], axis=0)
            point |= {f"{prefix}loss": float(found[0]), f"{prefix}accuracy": float(found[1])}
            point |= {f"{prefix}samples": len(rows)}
        return point

    def pass_observations(self, folders: list[Path]) -> None:
        """Hand on what the jobs of a round observed: their peaks, and their times (of one after another)."""
        for kind, seen in (("times", self.seconds), ("peaks", self.rounds.peaks)):
            for folder in folders:
                seen += io.read_table(folder / f"{kind}.obs.parquet").to_pylist()

    def write_world(self, state: Path, own: Path, world: World, t: int) -> None:
        keep = needed_states(self.route, t)
        self.stopped = world.watch.stopped
        watch = {"watch": asdict(world.watch)} if self.run.stop else {}
        write_states(state, {n: s for n, s in world.states.items() if n in keep}, t, {**self.meta, **watch})
        write_owns(own, world.owns, self.meta)
        folders = {"state": state, "own": own}
        self.holds = {kind: sorted(f.name for f in folder.iterdir()) for kind, folder in folders.items()}

    def write_metrics(self, rounds: Path, curve: Path, times: Path, peaks: Path, points: Rows, first: int) -> None:
        """Metrics of the rounds since state `first`. Observations first: with the results there, the step is done."""
        io.write_table(times, self.seconds, self.meta, TIMES)
        io.write_table(peaks, self.rounds.peaks, self.meta, PEAKS)
        stopped = {"stopped": self.stopped} if self.run.stop else {}
        manifest = {"first": first, "holds": self.holds}
        io.write_table(rounds, self.log_rows, {**self.meta, **manifest, **stopped}, METRICS)
        columns = CURVE_VAL if self.run.data.partition.val else CURVE
        io.write_table(curve, points, {**self.meta, **stopped}, columns)


def _version(name: str) -> int:
    return int(name.split("@")[1])


def rows_by_client(shares: pa.Table, split: str) -> dict[int, Tensor]:
    """Rows of the data [n] of each client in one split, ascending; clients without any have an empty tensor."""
    client, rows = numbers(shares["client"]), numbers(shares["row"])
    chosen = np.array([s == split for s in shares["split"].to_pylist()], bool)
    order = np.lexsort((rows[chosen], client[chosen]))
    clients = np.unique(client)
    parts = np.split(rows[chosen][order], np.searchsorted(client[chosen][order], clients[1:]))
    return {int(c): torch.from_numpy(p.astype(np.int64)) for c, p in zip(clients, parts, strict=True)}
