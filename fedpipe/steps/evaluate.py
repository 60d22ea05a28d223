"""Step evaluate: the last state, pooled over all test rows and through each client's eyes."""

from pathlib import Path

import pyarrow as pa
import torch

from fedpipe import io
from fedpipe.data import dataset
from fedpipe.evaluation import client_scores, columns, pooled
from fedpipe.opened import rows_by_client
from fedpipe.runtime import Runtime
from fedpipe.states import read_world
from fedpipe.steps import provenance
from fedpipe.studyfile import load_run
from fedpipe.types import Row

SCHEMA = pa.schema(
    [("client", pa.int32()), ("column", pa.string()), ("loss", pa.float64()), ("accuracy", pa.float64())]
    + [("samples", pa.int32())]
)


def run(
    run: Path, data: Path, partition: Path, plans: Path, assignment: Path, state: Path, own: Path, *, metrics: Path
) -> None:
    """Write loss and accuracy: one pooled row (client null), and a row per client with test rows and column."""
    spec = load_run(run)
    rt = Runtime(spec, dataset.load(data))
    table, shares = io.read_table(plans), io.read_table(partition)
    world, _ = read_world(state, own, rt.state0)
    training, testing = rows_by_client(shares, "train"), rows_by_client(shares, "test")
    people = {r["client"]: r for r in io.read_table(assignment).to_pylist()}
    server = world.states[max(world.states, key=lambda n: int(n.split("@")[1]))]
    everything = torch.cat(list(testing.values())).sort().values
    rows = list(columns({"global": pooled(rt, server, everything)}, None, len(everything)))
    for client, test in testing.items():
        if len(test):
            row = Row(budget=people[client]["budget"], samples=len(training[client]))
            found = client_scores(rt, server, world.own(client), client, row, training[client], test)
            rows += columns(found, client, len(test))
    made = provenance("evaluate", spec, [data, partition, plans, assignment, state, own])
    kept = {k: io.table_meta(table)[k] for k in ("method", "label", "seed", "platform")}
    io.write_table(metrics, rows, {**made, **kept}, SCHEMA)
