"""The picture of plans: one row per budget group, the model's units in order, predicted peaks at the right."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fedpipe.io import table_meta
from fedpipe.report.figures import HELD, INK, MUTED, colour, styled
from fedpipe.report.results import first_rows
from fedpipe.types import matches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
# what a bar is made of, from the left: kinds of `memory.Parts`, and their colour
STACK: dict[str, tuple[tuple[str, ...], str]] = {
    "parameters, method's state": (("parameters", "state"), "#3F4450"),
    "optimizer": (("optimizer",), "#7C8494"),
    "gradients": (("gradients",), "#B3B9C5"),
    "activations": (("activations", "features"), "#2A9D8F"),
    "temporaries, workspace": (("temporaries", "workspace"), "#A9DCD3"),
}
_HATCH: dict[str, Any] = {"facecolor": "white", "edgecolor": "#B9BDC4", "hatch": "////", "linewidth": 0.8}


@dataclass(frozen=True)
class Group:
    """Clients of one budget who got one plan (none: left out). Bytes throughout."""

    budget: int | None
    clients: int
    needs: int | None
    phases: list[dict[str, Any]]
    name: str | None = None  # of the budget, where it is not its size: a device, a width

    def trained(self, unit: str) -> list[int]:
        return [i for i, p in enumerate(self.phases) if unit in p["trains"]]

    def held(self, unit: str) -> bool:
        patterns = [tuple(p[k] or ()) for p in self.phases for k in ("down", "fixed", "keep")]
        return any(matches(f"{space}/{unit}.weight", p) for p in patterns for space in ("model", "own"))

    @property
    def title(self) -> str:
        if self.budget is None:
            return "no limit"
        size = f"{self.budget / MIB:.3g} MiB"
        return size if self.name is None or self.name.endswith("iB") else f"{self.name}: {size}"

    @property
    def subtitle(self) -> str:
        made = json.loads(self.phases[0]["model"] or "{}") if self.phases else {}
        built = "".join(f", {k} {v}" for k, v in (made.items() if isinstance(made, dict) else made))
        return f"{self.clients} client{'s' if self.clients != 1 else ''}{built}"


def groups(plans: pa.Table, assignment: pa.Table) -> list[Group]:
    """Rows of the picture, in order of budget groups; each client counts by its first assignment."""
    phases: dict[str | None, list[dict[str, Any]]] = {}
    for row in sorted(plans.to_pylist(), key=lambda r: r["phase"]):
        phases.setdefault(row["plan"], []).append(row)
    names: dict[tuple[Any, ...], str | None] = {}
    together: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in first_rows(assignment.to_pylist()):
        key = row["group"], row["budget"], row["plan"]
        together.setdefault(key, []).append(row)
        names[key] = row.get("name")
    order = sorted(together, key=lambda k: (k[0], k[2] or ""))
    needs = {k: max((r["needs"] for r in together[k] if r["needs"] is not None), default=None) for k in order}
    return [Group(k[1], len(together[k]), needs[k], phases.get(k[2], []), names[k]) for k in order]


def _ink(fill: str) -> str:
    """Black or white, whichever reads better on a colour (sRGB luma)."""
    r, g, b = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * r + 0.587 * g + 0.114 * b < 140 else INK


def _numbers(phases: list[int]) -> str:
    """`1-4` for phases in a row, else `1,3`; counted from 1."""
    first, last = phases[0] + 1, phases[-1] + 1
    if len(phases) > 2 and last - first == len(phases) - 1:
        return f"{first}–{last}"
    return ",".join(str(p + 1) for p in phases)


def _cell(ax: "Axes", x: float, y: float, group: Group, unit: str, size: float) -> None:
    from matplotlib.patches import Rectangle

    left, top, width, height = x + 0.03, y + 0.11, 0.94, 0.78
    trained = group.trained(unit)
    if not trained:
        look = {"facecolor": HELD, "edgecolor": "none"} if group.held(unit) else _HATCH
        ax.add_patch(Rectangle((left, top), width, height, **look))
        return
    share = width / len(trained)
    for i, phase in enumerate(trained):
        ax.add_patch(Rectangle((left + i * share, top), share, height, facecolor=colour(phase), edgecolor="none"))
    ink, box = _ink(colour(trained[0])), None
    if len(trained) > 1:
        ink, box = INK, {"boxstyle": "round,pad=0.22", "facecolor": "white", "edgecolor": "none", "alpha": 0.92}
    ax.text(x + 0.5, y + 0.5, _numbers(trained), ha="center", va="center", color=ink, fontsize=size, bbox=box)


def _units(ax: "Axes", rows: list[Group], units: list[str]) -> None:
    from matplotlib.patches import Rectangle

    size = 10 if len(units) <= 14 else 7.5
    for y, group in enumerate(rows):
        beside: dict[str, Any] = {
            "xy": (-0.15, y + 0.5),
            "textcoords": "offset points",
            "ha": "right",
            "annotation_clip": False,
        }
        ax.annotate(group.title, xytext=(0, 2), va="bottom", weight="bold", **beside)
        ax.annotate(group.subtitle, xytext=(0, -3), va="top", color=MUTED, fontsize=8.5, **beside)
        if group.phases:
            for x, unit in enumerate(units):
                _cell(ax, x, y, group, unit, size)
            continue
        ax.add_patch(Rectangle((0.03, y + 0.11), len(units) - 0.06, 0.78, **_HATCH))
        needs = "" if group.needs is None else f": would need {group.needs / MIB:.3g} MiB"
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "none"}
        ax.text(len(units) / 2, y + 0.5, f"left out{needs}", ha="center", va="center", bbox=box)
    steep = 90 if max(len(u) for u in units) * len(units) > 70 else 0
    ax.set(xlim=(0, len(units)), ylim=(len(rows), 0))
    ax.set_xticks([x + 0.5 for x in range(len(units))], units, rotation=steep, color=INK)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _bar(ax: "Axes", y: float, height: float, shares: list[tuple[int, dict[str, Any]]], at: int) -> None:
    """A bar of shares in bytes, one after another; the figure of their sum stands right of `at` bytes."""
    size = 0
    for share, look in shares:
        ax.barh(y, share / MIB, left=size / MIB, height=height, align="edge", **look)
        size += share
    ends: dict[str, Any] = {
        "xytext": (4, 0),
        "textcoords": "offset points",
        "va": "center",
        "fontsize": 8,
        "color": MUTED,
    }
    ax.annotate(
        f"{size / MIB:.1f}" if size >= MIB else f"{size / MIB:.2g}", (at / MIB, y + height / 2), zorder=4, **ends
    )


def _peaks(ax: "Axes", rows: list[Group]) -> None:
    """Predicted peaks, by phase, of what they are made of."""
    bars = [[_shares(p) for p in g.phases] or ([] if g.needs is None else [[(g.needs, _HATCH)]]) for g in rows]
    sizes = [[sum(size for size, _ in shares) for shares in mine] for mine in bars]
    widest = 1.17 * max([1, *(s for row in sizes for s in row), *(g.budget for g in rows if g.budget is not None)])
    for y, group in enumerate(rows):
        height = min(0.3, 0.78 / max(1, len(sizes[y])))
        for i, (size, shares) in enumerate(zip(sizes[y], bars[y], strict=True)):
            top = y + 0.5 - height * len(sizes[y]) / 2 + i * height
            limit = group.budget or 0
            at = limit if size <= limit < size + 0.13 * widest else size  # else the budget's line would cover it
            _bar(ax, top + 0.06 * height, 0.88 * height, shares, at)
            if group.phases:
                mark: dict[str, Any] = {"fontsize": 8, "va": "center", "ha": "right", "color": INK}
                ax.text(-0.008 * widest / MIB, top + height / 2, str(i + 1), **mark)
        if group.budget is not None:
            ax.plot([group.budget / MIB] * 2, [y + 0.07, y + 0.93], color=INK, lw=2, solid_capstyle="butt", zorder=5)
    ax.set(ylim=(len(rows), 0), xlim=(0, widest / MIB), xlabel="predicted peak of each phase (MiB)")
    ax.set_yticks([])
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)


def _shares(phase: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return [(sum(phase[k] for k in kinds), {"color": c}) for kinds, c in STACK.values()]


def _legend(figure: "Figure", rows: list[Group], units: list[str]) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    count = max((len(g.phases) for g in rows), default=0)
    handles: list[Any] = [Patch(color=colour(i)) for i in range(min(count, 7))]
    names = [f"phase {i + 1}" for i in range(min(count, 7))]
    if any(len(g.trained(u)) > 1 for g in rows for u in units):
        handles, names = [*handles, (Patch(color=colour(0)), Patch(color=colour(1)))], [*names, "several phases"]
    if any(g.held(u) and not g.trained(u) for g in rows for u in units):
        handles, names = [*handles, Patch(color=HELD)], [*names, "held, not trained"]
    if any(not g.held(u) and not g.trained(u) for g in rows for u in units):
        handles, names = [*handles, Patch(**_HATCH)], [*names, "not held"]
    if count:
        handles += [Patch(color=c) for _, c in STACK.values()]
        names += list(STACK)
    if any(g.budget is not None for g in rows):
        handles, names = [*handles, Line2D([], [], color=INK, lw=2)], [*names, "budget"]
    split = {tuple: HandlerTuple(ndivide=None, pad=0)}
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(-(-len(names) // 2), 8), "fontsize": 9}
    figure.legend(handles, names, handler_map=split, handlelength=1.3, columnspacing=1.4, **place)


@styled
def draw(plans: pa.Table, assignment: pa.Table) -> "Figure":
    """See `figures.plan_picture`. The plans' metadata names the model's units in order."""
    from matplotlib.figure import Figure

    meta, rows = table_meta(plans, "plans.parquet"), groups(plans, assignment)
    units: list[str] = meta["units"]
    tall = max(0.62, 0.165 * max((len(g.phases) for g in rows), default=1))
    figure = Figure(figsize=(10.4, 1.7 + tall * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    _units(left, rows, units)
    _peaks(right, rows)
    left.set_title(f"{meta['label']}: the phase in which each unit is trained", pad=10)
    _legend(figure, rows, units)
    return figure
