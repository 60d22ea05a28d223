"""The label histogram of every client as a picture."""

import io
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from fedpipe.data.draw import Ints

BARS = 60  # clients that still are bars with a number each
_STYLE: Any = {
    "svg.hashsalt": "fedpipe",
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MOST = 1000  # clients that are drawn at all


def draw(labels: Ints, names: list[str]) -> dict[str, bytes]:
    """SVG and PNG of training rows [clients, classes]: bars for a few clients, a heat map for many.

    Equal counts give equal bytes. Of more than 1,000 clients, 1,000 evenly spread ones are drawn.
    """
    with rc_context(_STYLE):
        figure = _bars(labels, names) if len(labels) <= BARS else _heat(labels, names)
        return {kind: _bytes(figure, kind) for kind in ("svg", "png")}


def _bytes(figure: Figure, kind: str) -> bytes:
    sink = io.BytesIO()
    none = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(sink, format=kind, metadata=none, dpi=120)
    return sink.getvalue()


def _bars(labels: Ints, names: list[str]) -> Figure:
    clients, classes = labels.shape
    figure = Figure(figsize=(6.5, 1.0 + 0.16 * clients), layout="constrained")
    axes = figure.subplots()
    colours = _colours(classes)
    start = np.zeros(clients, np.int64)
    for c in range(classes):
        axes.barh(np.arange(clients), labels[:, c], left=start, height=0.85, color=colours[c], label=names[c])
        start += labels[:, c]
    axes.set(
        xlabel="training rows",
        ylabel="client",
        ylim=(clients - 0.5, -0.5),
        yticks=np.arange(0, clients, max(1, clients // 20)),
    )
    if classes <= 20:
        figure.legend(
            loc="outside upper center", ncols=min(classes, 10), frameon=False, handlelength=1, columnspacing=1
        )
    return figure


def _heat(labels: Ints, names: list[str]) -> Figure:
    """Shares of each client's rows by class, beside its number of rows."""
    clients, classes = labels.shape
    drawn = np.unique(np.linspace(0, clients - 1, min(clients, MOST)).astype(np.int64))
    part = labels[drawn]
    rows = part.sum(1)
    figure = Figure(figsize=(6.5, 7.5), layout="constrained")
    heat, sizes = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    image = heat.imshow(
        part / np.maximum(rows, 1)[:, None], aspect="auto", cmap="viridis", vmin=0, interpolation="nearest"
    )
    heat.set(xlabel="class", ylabel="client" if len(drawn) == clients else f"{len(drawn):,} of {clients:,} clients")
    ticks = np.unique(np.linspace(0, len(drawn) - 1, 11).astype(np.int64))
    heat.set_yticks(ticks, [str(drawn[t]) for t in ticks])
    if classes <= 20:
        heat.set_xticks(np.arange(classes), names, rotation=90 if max(map(len, names)) > 2 else 0)
    sizes.fill_betweenx(np.arange(len(drawn)), rows, step="mid", color="0.6")
    sizes.set(xlabel="training rows", xlim=(0, None))
    figure.colorbar(image, ax=heat, location="top", shrink=0.6, label="share of the client's rows")
    return figure


def _colours(classes: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    if classes <= 10:
        return [colormaps["tab10"](c) for c in range(classes)]
    return [colormaps["turbo"](c / (classes - 1)) for c in range(classes)]
