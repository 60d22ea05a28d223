"""Step select: the values of a method's grids, chosen by the clients' validation rows at a seed of its own."""

from pathlib import Path

import pyarrow as pa

from fedpipe import io
from fedpipe.errors import FedpipeError
from fedpipe.methodspec import points, setting_label
from fedpipe.steps import provenance
from fedpipe.studyfile import load_run

SCHEMA = pa.schema(
    [("settings", pa.string()), ("loss", pa.float64()), ("accuracy", pa.float64()), ("samples", pa.int32())]
    + [("chosen", pa.bool_())]
)


def run(run: Path, metrics: list[Path], *, chosen: Path) -> None:
    """Write one row per point of the grids: its settings (JSON), validation loss and accuracy, whether it is chosen.

    `metrics` are those of the runs of each point, in any order. The best accuracy is chosen, of equal ones the least
    loss, then the first of the grid. Raises FedpipeError naming what is missing.
    """
    spec = load_run(run)
    found = {}
    for path in metrics:
        table = io.read_table(path)
        seen = [r for r in table.to_pylist() if r["column"] == "validation" and r["client"] is None]
        if not seen:
            raise FedpipeError(f"{path}: no validation row; data.partition.val left no client any")
        found[io.table_meta(table)["label"]] = seen[0]
    rows = []
    for point in points(spec.method):
        if (label := setting_label(point)) not in found:
            raise FedpipeError(f"metrics: none are of {label}, a point of the grid in {run}")
        scores = {k: found[label][k] for k in ("loss", "accuracy", "samples")}
        rows.append({"settings": io.canonical(point.settings), **scores, "chosen": False})
    best = min(rows, key=lambda r: (-r["accuracy"], r["loss"]))
    best["chosen"] = True
    io.write_table(chosen, rows, {**provenance("select", spec, metrics), "method": spec.method.name}, SCHEMA)
