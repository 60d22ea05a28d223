"""The steps, in the order of the data. Each module's `run` is a function of files and knows nothing of a workflow."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedpipe import io
from fedpipe.config import Run, Study
from fedpipe.digest import step_digest
from fedpipe.errors import Damaged

STEPS = (
    "data",
    "partition",
    "measure",
    "assign",
    "train",
    "aggregate",
    "segment",
    "evaluate",
    "select",
    "table",
    "report",
)
_contents: dict[tuple[str, int, int], str] = {}


def content(path: Path) -> str:
    """Content digest of an artefact or of a folder of them, whole files only; Damaged names the file."""
    if path.is_dir():
        return io.digest(*(p.name + content(p) for p in sorted(path.iterdir()) if not p.name.startswith(".")))
    if not path.is_file():
        raise Damaged(f"{path}: no such file; the step that writes it has not run")
    stat = path.stat()
    key = (str(path), stat.st_mtime_ns, stat.st_size)
    if key not in _contents:
        _contents[key] = io.read_meta(path)["content"]
    return _contents[key]


def provenance(step: str, spec: Run | Study, inputs: Iterable[Path] = ()) -> dict[str, Any]:
    """What an artefact was made by and from: its `key` is equal when nothing it depends on has changed."""
    code = step_digest(step, spec if isinstance(spec, Run) else None)
    made_by = [step, code, io.canonical(spec.model_dump(mode="json"))]
    return {"step": step, "key": io.digest(*made_by, *(content(p) for p in inputs))}


def measured(run: Path) -> list[Path]:
    """The results of a run folder that tables are made from."""
    series = [f for kind in ("rounds", "curve") for f in sorted((run / kind).glob("*.parquet"))]
    return [run / f"{n}.parquet" for n in ("plans", "assignment", "metrics")] + [
        f for f in series if not f.name.endswith(".obs.parquet")
    ]
