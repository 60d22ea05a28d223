"""What a person sees in the terminal: progress over rounds and the final table."""

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fedpipe.io import read_table
from fedpipe.report.cells import note, present

EVERY = 5.0  # seconds between plain lines
PIPE_WIDTH = 140  # columns of a log or pipe
MAIN = ("Method", "Accuracy (%)", "Difference (points)", "Taking part", "Idle rounds", "Phases", "Predicted peak (MiB)")


def duration(seconds: float) -> str:
    """`14 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """Rounds done of a run, on standard error: a bar in a terminal, elsewhere a line every few seconds.

    `done` counts rounds from the start of the run; a job that begins at a later round gives it as `start`, so that
    the time left is judged by the rounds that this job has made.
    """

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label, self.total, self.start = label, total, start
        self._console = Console(stderr=True, highlight=False)
        self._bar: Bar | None = None
        self._accuracy: float | None = None
        self._began = self._spoke = time.monotonic()

    def __enter__(self) -> Self:
        self._began = self._spoke = time.monotonic()
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.start, note="")
            self._bar.start()
        return self

    def advance(self, done: int, accuracy: float | None = None) -> None:
        """`done` rounds are finished; `accuracy` (0..1) of the server's model where it was just evaluated."""
        now = time.monotonic()
        self._accuracy = self._accuracy if accuracy is None else accuracy
        notes = [] if self._accuracy is None else [f"accuracy {self._accuracy:.2f}"]
        if self.start < done < self.total:
            left = (now - self._began) / (done - self.start) * (self.total - done)
            notes.append(f"about {duration(left)} left")
        if self._bar:
            self._bar.update(self._task, completed=done, note=", ".join(notes))
        elif now - self._spoke >= EVERY or done >= self.total:
            self._spoke = now
            line = ", ".join([f"{self.label}: round {done}/{self.total}", *notes])
            print(line, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


def _grid(headers: list[str], rows: list[list[str]]) -> Table:
    grid = Table(header_style="bold", pad_edge=False, box=SIMPLE_HEAD)
    for i, header in enumerate(headers):
        grid.add_column(escape(header), justify="right" if i else "left")
    for row in rows:
        grid.add_row(*map(escape, row))
    return grid


def print_rows(title: str, headers: list[str], rows: list[list[str]]) -> None:
    """Print rows of text under a title; columns that are empty or 0.00 throughout are left out."""
    told = [i for i in range(len(headers)) if any(row[i] not in ("", "0.00") for row in rows)]
    grid = _grid([headers[i] for i in told], [[row[i] for i in told] for row in rows])
    out = Console(highlight=False)
    out = out if out.is_terminal else Console(highlight=False, width=4 * PIPE_WIDTH)
    out.print(title, style="bold", markup=False)
    out.print(grid)


def print_table(path: Path, console: Console | None = None) -> None:
    """Print the final table (table.parquet, with its observations beside it) to standard output.

    One row per method where the window is wide enough for that, else one column per method; where there are too many
    methods for that, the main figures of each in one row.
    """
    observations = path.with_suffix(".obs.parquet")
    shown = present(read_table(path), read_table(observations) if observations.is_file() else None)
    out = console or Console(highlight=False)
    width = out.width if out.is_terminal else PIPE_WIDTH
    turned = [list(column) for column in zip(shown.headers, *shown.rows, strict=True)]
    main = [column for column in turned if column[0] in MAIN]
    brief = [list(row) for row in zip(*main, strict=True)]
    layouts = [_grid(shown.headers, shown.rows), _grid(turned[0], turned[1:]), _grid(brief[0], brief[1:])]
    unbound = out.options.update(width=10_000)
    fitting = [grid for grid in layouts if Measurement.get(out, unbound, grid).maximum <= width]
    out.print((fitting or layouts[-1:])[0], width=width)
    out.print(note(shown), width=min(width, 100), style="dim", markup=False)
