"""The picture of peaks: a bar per method and budget of what its largest phase needs, the budget, what was measured."""

from itertools import groupby
from typing import TYPE_CHECKING, Any

from fedpipe.report.figures import INK, MUTED, colour, styled
from fedpipe.report.peaks import Largest
from fedpipe.report.plan_picture import STACK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
BAR = 0.19  # inches
BESIDE: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}


@styled
def draw(rows: list[Largest]) -> "Figure":
    """One pair of axes per network, rows of a method together."""
    from matplotlib.figure import Figure

    networks = [list(mine) for _, mine in groupby(rows, key=lambda r: r.run.run.model.name)]
    heights = [len(mine) + len({r.run.run.label for r in mine}) + 2.5 for mine in networks]
    figure = Figure(figsize=(9.6, BAR * sum(heights) + 0.6), layout="constrained")
    each = figure.subplots(len(networks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, mine in zip(each, networks, strict=True):
        _network(ax, mine)
    _legend(figure, rows)
    return figure


def _network(ax: "Axes", rows: list[Largest]) -> None:
    y, ticks, names = 0.0, list[float](), list[str]()
    for label, mine in groupby(rows, key=lambda r: r.run.run.label):
        ax.annotate(label, (0, y), **BESIDE, fontsize=8, weight="bold")
        for row in mine:
            y += 1
            _bar(ax, y, row)
            ticks.append(y)
            names.append(row.group.name or "no limit")
        y += 1
    ax.set_yticks(ticks, names, fontsize=8)
    ax.set(ylim=(y, -0.8), xlabel="peak of a client's largest phase (MiB)", title=rows[0].run.run.model.name)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")


def _bar(ax: "Axes", y: float, row: Largest) -> None:
    left = 0.0
    for kinds, shade in STACK.values():
        size = sum((row.parts or {}).get(k) or 0 for k in kinds) / MIB
        ax.barh(y, size, left=left, height=0.72, color=shade)
        left += size
    if row.measured is not None:
        ax.plot([row.measured / MIB], [y], marker="D", ms=3, color=colour(5), ls="none", zorder=6)
    if row.group.budget is not None and row.run.limited:
        ax.plot([row.group.budget / MIB] * 2, [y - 0.45, y + 0.45], color=INK, lw=1.8, zorder=5)
    if row.parts is None:
        ax.annotate("left out", (0, y), **BESIDE, fontsize=7.5, color=MUTED)


def _legend(figure: "Figure", rows: list[Largest]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: dict[str, Any] = {name: Patch(color=shade) for name, (_, shade) in STACK.items()}
    if any(r.measured is not None for r in rows):
        handles["measured"] = Line2D([], [], marker="D", ms=3, color=colour(5), ls="none")
    if any(r.group.budget is not None and r.run.limited for r in rows):
        handles["budget"] = Line2D([], [], color=INK, lw=1.8)
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=4, fontsize=8.5, handlelength=1.3)
