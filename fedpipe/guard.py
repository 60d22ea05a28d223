"""Before a study runs: nobody else may be at work on its results."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fedpipe.errors import FedpipeError


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
