"""What a study's folder holds, in bytes, and what of it nothing needs any more."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fedpipe.errors import FedpipeError
from fedpipe.guard import held
from fedpipe.io import remove
from fedpipe.paths import StudyPaths
from fedpipe.report.cells import mib
from fedpipe.studyfile import load_study

_TEMPORARY = re.compile(r"\..+\.tmp")  # left by a writer that was killed


def size(path: Path, seen: set[tuple[int, int]]) -> int:
    """Bytes of a file, or of all files of a folder; files that are links of one another are counted once."""
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        stat = file.lstat()
        if file.is_file() and (key := (stat.st_dev, stat.st_ino)) not in seen:
            seen.add(key)
            total += stat.st_size
    return total


def usage(out: Path) -> list[tuple[str, int]]:
    """(part, bytes) of a results folder: what runs share, each run by kind of file, and what lies beside them."""
    if not out.is_dir():
        raise FedpipeError(f"{out}: no such folder; wanted the results folder of a study")
    seen: set[tuple[int, int]] = set()
    parts = sorted(f for f in out.iterdir() if f.name != "runs") + sorted(out.glob("runs/*/*"))
    return [(f.relative_to(out).as_posix(), size(f, seen)) for f in parts]


def unneeded(out: Path) -> Iterator[Path]:
    """Folders of runs, predictions and partitions the study no longer has, states and job folders of finished runs but
    for the first and the last state, and what killed writers left."""
    if not (out / "study.json").is_file():
        raise FedpipeError(f"{out}/study.json: no such file; wanted the results folder of a study")
    runs = StudyPaths(out, load_study(out / "study.json")).runs
    named = {f for p in runs for f in (p.folder, p.data.parent, p.partition.parent, p.prediction.parent)}
    named |= {f.parent for p in runs for f in p.chosen}
    for kind in ("runs", "data", "partition", "measure", "select"):
        yield from sorted(f for f in out.glob(f"{kind}/*") if f not in named and not _TEMPORARY.fullmatch(f.name))
    for p in runs:
        if p.metrics.is_file():
            lasting = {f(t) for t in (0, p.run.rounds) for f in (p.state, p.own)}
            yield from sorted(
                f for kind in ("state", "own") for f in (p.folder / kind).glob("[0-9]*") if f not in lasting
            )
            yield from sorted((p.folder / "train").glob("*"))
    yield from sorted(f for f in out.rglob(".*.tmp") if _TEMPORARY.fullmatch(f.name))


def collect(out: Path, yes: bool) -> None:
    """Say what nothing needs, and how large it is; remove it when told so. Refused while a command is at work there."""
    with held(out):
        seen: set[tuple[int, int]] = set()
        total = 0
        for path in list(unneeded(out)):
            total += (bytes_ := size(path, seen))
            print(f"{mib(bytes_):>10} MiB  {path}")
            if yes:
                remove(path)
    print(
        f"{mib(total):>10} MiB  {'removed' if yes else 'to be removed, by the same command with --yes'}",
        file=sys.stderr,
    )


def show(out: Path) -> None:
    """Print `usage`, the largest first, and the sum."""
    parts = usage(out)
    for name, bytes_ in sorted(parts, key=lambda part: -part[1]):
        print(f"{mib(bytes_):>10} MiB  {name}")
    print(f"{mib(sum(b for _, b in parts)):>10} MiB  {out}")
