"""Figures of a study, as matplotlib figures without any window; equal input gives equal SVG and PNG bytes."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import pyarrow as pa

from fedpipe.io import digest, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")
# Okabe and Ito's colours, safe for colour-blind readers: https://jfly.uni-koeln.de/color/
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
INK, MUTED, HELD = "#222222", "#666666", "#D5D7DB"
_LINES = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs on every machine
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "fedpipe",
    "svg.fonttype": "path",
}


@contextmanager
def style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with style():
            return draw(*args, **kwargs)

    return inside


def colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


@styled
def save(figure: "Figure", stem: Path) -> None:
    """Write `stem`.svg and `stem`.png (200 dots per inch), without dates or versions."""
    for kind in ("svg", "png"):
        write_bytes(stem.with_name(f"{stem.name}.{kind}"), drawn(figure, kind))


@styled
def drawn(figure: "Figure", kind: Literal["svg", "png"]) -> bytes:
    """The figure as a file of this kind."""
    sink = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(sink, format=kind, dpi=200, metadata=metadata, facecolor="white")
    return sink.getvalue()


def plan_file(label: str) -> str:
    """File name (without ending) of a label's plan picture; labels that differ never share one."""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", label).strip("-")
    return f"plans_{slug}" if slug == label else f"plans_{slug}-{digest(label)[:6]}"


def _axes(height: float = 3.8) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.subplots()


def _labels(table: pa.Table) -> list[str]:
    return list(dict.fromkeys(table["label"].to_pylist()))


def _bands(points: pa.Table, x: str, scale: float) -> Iterator[tuple[str, list[float], list[list[float]]]]:
    """Per label: x at each evaluated round (mean over seeds), and the seeds' accuracies in % there."""
    rows = [r for r in points.to_pylist() if r["accuracy"] is not None]
    for label in _labels(points):
        by_round: dict[int, list[dict[str, Any]]] = {}
        for r in rows:
            if r["label"] == label:
                by_round.setdefault(r["round"], []).append(r)
        at = [by_round[t] for t in sorted(by_round)]
        means = [sum(r[x] for r in group) / len(group) / scale for group in at]
        yield label, means, [[100 * r["accuracy"] for r in group] for group in at]


def _accuracy_curve(points: pa.Table, x: str, scale: float, xlabel: str) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    figure, ax = _axes()
    for i, (label, at, values) in enumerate(_bands(points, x, scale)):
        middle = [sum(v) / len(v) for v in values]
        line = _LINES[i // len(PALETTE) % len(_LINES)]
        ax.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=colour(i), alpha=0.18, lw=0)
        ax.plot(at, middle, color=colour(i), ls=line, lw=2, marker="o", ms=3.2, label=label)
    seeds = len(set(points["seed"].to_pylist()))
    band = f"; mean of {seeds} seeds, band: lowest to highest" if seeds > 1 else ""
    ax.set(xlabel=xlabel, ylabel="accuracy (%)", title=f"Accuracy on all test rows{band}", xmargin=0.02)
    if x == "round":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=min(4, len(_labels(points))))
    return figure


@styled
def accuracy_over_rounds(points: pa.Table) -> "Figure":
    """Accuracy of the server's model over rounds (table of schema summaries.CURVES)."""
    return _accuracy_curve(points, "round", 1, "round")


@styled
def accuracy_over_bytes(points: pa.Table) -> "Figure":
    """Accuracy of the server's model over the bytes sent until then (table of schema summaries.CURVES)."""
    return _accuracy_curve(points, "sent", 2**20, "sent up and down by all clients until then (MiB, headers included)")


@styled
def client_distribution(clients: pa.Table) -> "Figure":
    """Final accuracy of every client, all seeds together (table of schema summaries.CLIENTS)."""
    labels = _labels(clients)
    figure, ax = _axes(1.3 + 0.75 * max(1, len(labels)))
    rows = [r for r in clients.to_pylist() if r["accuracy"] is not None]
    for i, label in enumerate(labels):
        mine = [r for r in rows if r["label"] == label]
        values = [100 * r["accuracy"] for r in mine]
        box: dict[str, Any] = {"color": MUTED, "lw": 1}
        parts: dict[str, Any] = {
            "boxprops": box,
            "whiskerprops": box,
            "capprops": box,
            "medianprops": {"color": INK, "lw": 2.2},
        }
        ax.boxplot([values], positions=[i], orientation="horizontal", widths=0.5, showfliers=False, **parts)
        for out, face in ((False, colour(i)), (True, "none")):
            at = [(v, i + _apart(k)) for k, (v, r) in enumerate(zip(values, mine, strict=True)) if r["left_out"] == out]
            style: dict[str, Any] = {
                "s": 16,
                "facecolors": face,
                "edgecolors": colour(i),
                "linewidths": 0.9,
                "alpha": 0.75,
            }
            ax.scatter([p[0] for p in at], [p[1] for p in at], zorder=3, **style)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(False, axis="y")
    title = "Accuracy on each client's own test rows (server's model)"
    ax.set(xlabel="accuracy (%); box: median and quartiles; hollow: clients left out of training", title=title)
    return figure


def _apart(k: int) -> float:
    """Offset in -0.2..0.2 of the k-th point, so that equal values stay apart; evenly spread for any count."""
    return 0.4 * (k * 0.6180339887 % 1 - 0.5)


def plan_picture(plans: pa.Table, assignment: pa.Table) -> "Figure":
    """Who trains which unit in which phase, and its peak against the budget (plans.parquet, assignment.parquet)."""
    from fedpipe.report.plan_picture import draw

    return draw(plans, assignment)
