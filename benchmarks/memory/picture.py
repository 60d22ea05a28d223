"""The picture of the grid: predicted against measured bytes, and how many rows have which error."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.report.figures import MUTED, colour, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
EDGES = {"0": 0.0, "0.001 %": 1e-5, "0.01 %": 1e-4, "0.1 %": 1e-3, "1 %": 1e-2, "3 %": 3e-2, "more": float("inf")}
MARKS = "osD^vP"


@styled
def draw(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _scatter(left, rows, device)
    _errors(right, rows)
    figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")


def _scatter(axes: "Axes", rows: list[dict[str, Any]], device: str) -> None:
    ends = [min(r["measured"] for r in rows) / MIB / 1.3, max(r["measured"] for r in rows) / MIB * 1.3]
    axes.plot(ends, ends, color=MUTED, linewidth=0.8, zorder=0)
    for k, network in enumerate(dict.fromkeys(r["network"] for r in rows)):
        mine = [r for r in rows if r["network"] == network]
        axes.scatter(
            [r["measured"] / MIB for r in mine], [r["predicted"] / MIB for r in mine], s=14, marker=MARKS[k % 6],
            facecolors="none", edgecolors=colour(k), linewidths=0.8, label=f"{network} ({len(mine)})",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured peak, MiB", ylabel="predicted, MiB")
    axes.set_title(f"Predicted and measured peaks, {device}")
    axes.legend()


def _errors(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    """Bars by the size of the error: most are far below what a linear axis would show."""
    errors, below = [abs(r["error"]) for r in rows], 0
    for k, edge in enumerate(EDGES.values()):
        upto = sum(e <= edge for e in errors)
        axes.bar(k, upto - below, color=colour(0))
        axes.annotate(str(upto - below), (k, upto - below), ha="center", va="bottom")
        below = upto
    axes.set_xticks(range(len(EDGES)), EDGES, rotation=30)
    axes.set(xlabel="size of the relative error, up to", ylabel="rows")
    axes.set_title(f"Error of {len(rows)} predictions")
