"""Before a study goes on: what is damaged or has gone is named, so that it is made again with what depends on it."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedpipe.errors import FedpipeError
from fedpipe.io import checksum, read_meta, remove, whole
from fedpipe.paths import RunPaths, StudyPaths


def mend(paths: StudyPaths, jobs: int = 0) -> None:
    """Remove what is damaged. What is missing is named only where something that was made from it is there.

    jobs: train jobs of a round from now on; what another number of them has trained of a round goes, too.
    """
    _damaged(f for run in paths.runs for f in _shared(run))
    _mend_beside(run.clients for run in paths.runs)
    begun = [run for run in paths.runs if _mend_run(run)]
    for run in paths.runs:
        _mend_jobs(run, jobs)
    _missing(f for run in begun for f in _shared(run))
    if paths.table.is_file():
        _missing(run.metrics for run in begun if run.rounds(run.run.rounds).is_file())
    _mend_table(paths)


def _shared(run: RunPaths) -> list[Path]:
    """What other runs may be made from as well."""
    return [run.data, run.partition, run.clients, *run.chosen, run.prediction, run.tried]


def _mend_run(run: RunPaths) -> bool:
    """Whether anything of the run itself is there: then all it was made from ought to be."""
    plans = [run.plans, run.assignment, run.route]
    ends = sorted(int(f.stem) for f in run.folder.glob("rounds/*.parquet") if f.stem.isdecimal())
    series = [f(t) for t in ends for f in (run.rounds, run.curve, run.times, run.peaks)]
    begun = any(f.is_file() for f in (*plans, *series, run.metrics))
    done = run.metrics.is_file()
    _damaged([*plans, *series, run.metrics])
    if begun:
        before = [run.rounds(first) for t in ends if (first := _manifest(run.rounds(t)).get("first"))]
        last = [run.rounds(run.run.rounds)] if done else []
        _missing([*plans, *before, *series, *last])
    there = {int(f.name) for kind in ("state", "own") for f in run.folder.glob(f"{kind}/[0-9]*")}
    for t in sorted(there | ({0} if begun else set()) | ({run.run.rounds} if done else set())):
        _mend_world(run, t)
    return begun


def _mend_jobs(run: RunPaths, jobs: int) -> None:
    for folder in sorted(run.folder.glob("train/*/*")):
        manifest = _manifest(folder / "metrics.arrow")
        names = ["metrics.arrow", *manifest.get("holds", ())]
        if _damaged(f for f in sorted(folder.rglob("[!.]*")) if f.is_file()) + _missing(folder / n for n in names):
            remove(folder)
        elif jobs and manifest.get("jobs") != jobs:
            _say(folder, f"one of {manifest.get('jobs')} jobs of its round, not {jobs}")
            remove(folder)


def _mend_world(run: RunPaths, t: int) -> None:
    """The folders of state t go when a file in them is damaged, or one that the manifest names is missing."""
    folders = {"state": run.state(t), "own": run.own(t)}
    holds = _manifest(run.rounds(t) if t else run.route).get("holds", {})
    bad = _damaged(f for folder in folders.values() for f in sorted(folder.glob("*.safetensors")))
    bad += _missing(folder / n for kind, folder in folders.items() for n in holds.get(kind, ()))
    if not bad and (gone := [f for f in folders.values() if not f.is_dir()]):
        bad = _missing(gone)
    if bad:
        for folder in folders.values():
            remove(folder)


def _mend_table(paths: StudyPaths) -> None:
    observed = paths.table.with_suffix(".obs.parquet")
    _damaged([paths.table, observed, paths.report])
    _mend_beside([paths.table])
    if paths.report.is_file():
        _missing([paths.table])
    if paths.table.is_file() and _missing([observed, paths.report]) == [observed]:
        remove(paths.table)


def _mend_beside(files: Iterable[Path]) -> None:
    """A table goes with any of the texts and pictures made with it, which carry no seal of their own."""
    for file in dict.fromkeys(files):
        beside = {file.parent / name: known for name, known in _manifest(file).get("beside", {}).items()}
        other = [f for f, known in beside.items() if f.is_file() and checksum(f) != known]
        for f in other:
            _say(f, "damaged")
            remove(f)
        if other or _missing(beside):
            remove(file)


def _manifest(file: Path) -> dict[str, Any]:
    """What a file says of others; nothing where it is not there or of another format, which its own step finds out."""
    try:
        return read_meta(file)
    except FedpipeError:
        return {}


def _missing(files: Iterable[Path]) -> list[Path]:
    """Those that are not there, each named."""
    gone = [f for f in dict.fromkeys(files) if not f.exists()]
    for f in gone:
        _say(f, "missing")
    return gone


def _damaged(files: Iterable[Path]) -> list[Path]:
    """Those whose bytes are not those that were written, each named and removed."""
    bad = [f for f in dict.fromkeys(files) if f.is_file() and not whole(f)]
    for f in bad:
        _say(f, "damaged")
        remove(f)
    return bad


def _say(file: Path, what: str) -> None:
    print(f"fedpipe: {file}: {what}; making it again", file=sys.stderr)
