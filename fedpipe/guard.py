"""Before a study runs: nobody else may be at work on its results, and what is damaged is made again."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from fedpipe.errors import Damaged, FedpipeError
from fedpipe.io import read_meta
from fedpipe.paths import RunPaths, StudyPaths


def hold(out: Path) -> int:
    """Take the lock of a results folder until this process ends; the kernel frees it, whatever ends the process.

    Returns the open descriptor. Raises FedpipeError naming the host and pid of whoever holds it.
    """
    path = out / ".lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise FedpipeError(f"{path}: could not be written ({e.strerror})") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 200).decode(errors="replace").strip()
        raise FedpipeError(f"{out}: another command is at work here ({holder}); wait for it, or stop it") from None
    except OSError as e:
        raise FedpipeError(f"{path}: no lock to be had on this file system (flock: {e.strerror})") from e
    os.ftruncate(lock, 0)
    os.write(lock, f"host {socket.gethostname()}, pid {os.getpid()}\n".encode())
    return lock


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """`hold`, for the length of a block."""
    lock = hold(out)
    try:
        yield
    finally:
        os.close(lock)


def forget_stale_locks(workdir: Path, out: Path) -> None:
    """Remove the workflow engine's own locks on files of `out`: whoever holds its lock knows them to be stale."""
    for lock in (workdir / ".snakemake" / "locks").glob("*.lock"):
        files = lock.read_text().splitlines()
        if any((workdir / f).resolve().is_relative_to(out.resolve()) for f in files):
            lock.unlink(missing_ok=True)


def mend(paths: StudyPaths) -> list[Path]:
    """Name and remove what is damaged, so that it is made again with what depends on it; returns what was removed."""
    removed = []
    for run in paths.runs:
        shared = [
            run.data,
            run.partition,
            run.clients,
            run.prediction,
            run.plans,
            run.assignment,
            run.route,
            run.metrics,
            *run.chosen,
        ]
        series = [f for kind in ("rounds", "curve") for f in sorted((run.folder / kind).glob("*.parquet"))]
        removed += [f for f in dict.fromkeys([*shared, *series]) if f.is_file() and not _whole(f)]
        for t in sorted(int(f.name) for f in (run.folder / "state").glob("[0-9]*")):
            removed += _mend_world(run, t)
    removed += [f for f in [paths.table] if f.is_file() and not _whole(f)]
    return removed


def _mend_world(run: RunPaths, t: int) -> list[Path]:
    """The folders of state t go when a file in them is damaged, or one that the manifest names is missing."""
    folders = {"state": run.state(t), "own": run.own(t)}
    names = {kind: [] for kind in folders} if not run.rounds(t).is_file() else read_meta(run.rounds(t))["holds"]
    bad = []
    for kind, folder in folders.items():
        missing = [n for n in names[kind] if not (folder / n).is_file()]
        for n in missing:
            print(f"fedpipe: {folder / n}: missing; making it again", file=sys.stderr)
        files = sorted(folder.glob("*.safetensors"))
        empty = kind == "state" and not files  # there is no round without a state
        if missing or empty or not folder.is_dir() or not all([_whole(f) for f in files]):
            bad.append(folder)
    if bad:
        for folder in folders.values():
            for f in folder.glob("*"):
                f.unlink()
            if folder.is_dir():
                folder.rmdir()
    return bad


def _whole(file: Path) -> bool:
    """Whether a file is whole; if not, it is named and removed. One of another format is left to its step."""
    try:
        read_meta(file)
    except Damaged as e:
        print(f"fedpipe: {str(e).partition(';')[0]}; making it again", file=sys.stderr)
        file.unlink()
        return False
    except FedpipeError:
        return True
    return True
