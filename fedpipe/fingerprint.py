"""One digest over all results of a study, whatever way of running made them: contents by kind, node or client, and
round. Paths, segment lengths, observations and pictures do not enter it."""

from pathlib import Path

from fedpipe.errors import FedpipeError
from fedpipe.io import digest
from fedpipe.report.results import load
from fedpipe.steps import content

_TABLES = ("plans", "assignment", "route", "metrics")


def fingerprint(out: Path) -> str:
    """Digest of the results folder of a finished study. Raises FedpipeError naming what is missing or damaged."""
    runs = sorted(p for p in (out / "runs").glob("*") if p.is_dir())
    if not runs:
        raise FedpipeError(f"{out}: no runs in this folder; wanted the results folder of a study")
    names = ("data/*/data.arrow", "*/*/p*.parquet", "partition/*/clients.parquet", "select/*/chosen.parquet")
    shared = sorted(f for name in names for f in out.glob(name))
    parts = [f"{p.parent.name}/{p.name} {content(p)}" for p in shared if not p.name.endswith(".obs.parquet")]
    for folder in runs:
        results = load(folder)
        parts += [f"{folder.name}/{t} {content(folder / f'{t}.parquet')}" for t in _TABLES]
        parts += [repr(results.rounds), repr(results.curve)]
        last = f"{results.run.rounds:06d}"
        for kind in ("state", "own"):
            parts += [f"{kind}/{p.name} {content(p)}" for p in sorted((folder / kind / last).glob("*.safetensors"))]
    return digest(*parts, content(out / "table.parquet"))
