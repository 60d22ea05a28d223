"""Step evaluate: the last state, pooled over all test rows and through each client's eyes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from fedpipe import io
from fedpipe.data import dataset
from fedpipe.evaluation import client_scores, columns, pooled
from fedpipe.memory.enforce import row_of
from fedpipe.opened import rows_by_client
from fedpipe.rounds import World
from fedpipe.runtime import Runtime
from fedpipe.states import read_world
from fedpipe.steps import provenance
from fedpipe.studyfile import load_run
from fedpipe.types import Tensors

SCHEMA = pa.schema(
    [("client", pa.int32()), ("column", pa.string()), ("loss", pa.float64()), ("accuracy", pa.float64())]
    + [("samples", pa.int32())]
)


def run(
    run: Path, data: Path, partition: Path, plans: Path, assignment: Path, state: Path, own: Path, *, metrics: Path
) -> None:
    """Write loss and accuracy: one pooled row (client null), and a row per client with test rows and column.

    Where the study sets validation rows aside, one more row (client null, column `validation`) is the mean over them of
    what each client would use: its own model where the method makes one, else the server's.
    """
    spec = load_run(run)
    rt = Runtime(spec, dataset.load(data))
    table, shares = io.read_table(plans), io.read_table(partition)
    world, _ = read_world(state, own, rt.first_state())
    training, testing = rows_by_client(shares, "train"), rows_by_client(shares, "test")
    people = {r["client"]: r for r in io.read_table(assignment).to_pylist()}
    server = world.states[max(world.states, key=lambda n: int(n.split("@")[1]))]
    everything = torch.cat(list(testing.values())).sort().values
    server, rest = rt.moved(server), torch.cat(list(training.values())).sort().values
    rows = list(columns({"global": pooled(rt, server, everything, rest)}, None, len(everything)))
    for client, test in testing.items():
        if len(test):
            row = row_of(people[client], len(training[client]), rt.run.budget)
            found = client_scores(rt, server, world.own(client), client, row, training[client], test)
            rows += columns(found, client, len(test))
    rows += _validation(rt, server, world, people, training, rows_by_client(shares, "val"))
    made = provenance("evaluate", spec, [data, partition, plans, assignment, state, own])
    kept = {k: io.table_meta(table)[k] for k in ("method", "label", "seed", "platform")}
    io.write_table(metrics, rows, {**made, **kept}, SCHEMA)


def _validation(
    rt: Runtime, server: Tensors, world: World, people: dict[int, dict[str, Any]],
    training: dict[int, Tensor], validation: dict[int, Tensor],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    each = []
    for client, rows in validation.items():
        if len(rows):
            row = row_of(people[client], len(training[client]), rt.run.budget)
            found = client_scores(rt, server, world.own(client), client, row, training[client], rows)
            each.append((len(rows), found.get("personal", found["global"])))
    if each:
        count = sum(n for n, _ in each)
        loss, accuracy = (sum(n * score[i] for n, score in each) / count for i in range(2))
        yield from columns({"validation": (loss, accuracy)}, None, count)
