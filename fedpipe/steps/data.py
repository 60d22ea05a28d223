"""Step `data`: decode the study's images once. The only step that may reach the Hugging Face hub."""

from pathlib import Path

from fedpipe.data.build import build
from fedpipe.io import write_table
from fedpipe.steps import provenance
from fedpipe.studyfile import load_run


def run(run: Path, *, data: Path) -> None:
    """Write `data.arrow` (image, label, test, and client with natural ids) for the run's `data` keys."""
    spec = load_run(run)
    table, meta = build(spec.data)
    write_table(data, table, {**meta, **provenance("data", spec)})
