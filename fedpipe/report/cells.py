"""The final table as text: which figures are shown, how they are rounded, and how each format escapes them."""

import re
from dataclasses import dataclass
from html import escape
from typing import Any

import pyarrow as pa

Row = dict[str, Any]
NOTE = (
    "Mean over seeds with its 95 % t-interval in brackets; difference: paired over seeds against the first method,"
    " * where its interval excludes 0; p: of the paired t-test, by Holm over the column."
    " Clients: mean and standard deviation over clients of the server's model."
    " Bytes are the lengths of messages, up / down, summed over clients and rounds."
    " Counts and bytes are means over seeds, phases (of a client in a round) and predicted peaks the largest."
)
OVER = "†"
FOOT = f" {OVER} over a client's budget; counted are pairs of client and phase whose prediction is."
# Columns that stand there only where a cell says something: more than this, and more than an empty one.
OPTIONAL = dict.fromkeys(("Failed updates", "Lost updates", "Over budget", "Largest excess (%)"), "0")
OPTIONAL |= {"Platforms": "1", "Personal (%)": "", "Target reached": "", "p (Holm)": ""}
OPTIONAL |= dict.fromkeys(("Rounds to target", "Bytes to target (MiB)", "Time to target (s)"), "")
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


@dataclass(frozen=True)
class Shown:
    """Headers and rows of text; an unknown figure is an empty cell."""

    headers: list[str]
    rows: list[list[str]]


def mib(count: float | None) -> str:
    """Bytes as MiB, with more digits for small ones."""
    if count is None:
        return ""
    value = count / 2**20
    return f"{value:.{2 if value >= 1 else 3 if value >= 0.001 or not count else 6}f}"


def percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def amount(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}".removesuffix(".0")


def over(excess: float | None) -> str:
    """The mark of a figure that is over a budget by some excess."""
    return f" {OVER}" if excess else ""


def note(shown: "Shown") -> str:
    """What is said below a table."""
    return NOTE + (FOOT if any(OVER in cell for row in shown.rows for cell in row) else "")


def _interval(r: Row, column: str, scale: float = 100, digits: int = 2, sign: str = "") -> str:
    value, low, high = (r[c] and scale * r[c] for c in (column, f"{column}_low", f"{column}_high"))
    if value is None:
        return ""
    text = f"{value:{sign}.{digits}f}"
    return text if low is None else f"{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _spread(r: Row, column: str) -> str:
    value = r[f"{column}_accuracy"]
    return "" if value is None else f"{percent(value, 1)} ± {percent(r[f'{column}_spread'], 1)}"


def _pair(r: Row, kind: str) -> str:
    return f"{mib(r[f'{kind}_up'])} / {mib(r[f'{kind}_down'])}"


def _claim(r: Row) -> str:
    return _interval(r, "accuracy_diff", sign="+") + (" *" if r["accuracy_differs"] else "")


def _cells(r: Row) -> dict[str, str]:
    return {
        "Method": r["label"],
        "Seeds": str(r["seeds"]),
        "Accuracy (%)": _interval(r, "accuracy"),
        "Difference (points)": _claim(r),
        "p (Holm)": "" if r["accuracy_p"] is None else f"{r['accuracy_p']:.3f}",
        "Paper (%)": percent(r["paper"]),
        "Loss": _interval(r, "loss", 1, 3),
        "Clients (%)": _spread(r, "client"),
        "Personal (%)": _spread(r, "personal"),
        "Taking part": f"{amount(r['taking_part'])} of {amount(r['clients'])}",
        "Left out": amount(r["left_out"]),
        "Idle rounds": f"{amount(r['idle_rounds'])} of {amount(r['rounds'])}",
        "Failed updates": amount(r["failed_updates"]),
        "Lost updates": amount(r["lost_updates"]),
        "Target reached": "" if r["reached"] is None else f"{r['reached']} of {r['seeds']}",
        "Rounds to target": amount(r["rounds_to_target"]),
        "Bytes to target (MiB)": mib(r["bytes_to_target"]),
        "Platforms": amount(r["platforms"]),
        "Local steps": amount(r["steps"]),
        "Payload up / down (MiB)": _pair(r, "payload"),
        "Headers up / down (MiB)": _pair(r, "header"),
        "Phases": amount(r["phases"]),
        "Predicted peak (MiB)": mib(r["predicted_peak"]) + over(r["over_budget"]),
        "Over budget": amount(r["over_budget"]),
    }


def present(table: pa.Table, observed: pa.Table | None = None) -> Shown:
    """The final table as text, with measured peaks and time where observations are given.

    "Personal" stands there only when some method has personal models, "Failed updates", "Lost updates", "Over budget"
    and "Largest excess" only when some were, "Platforms" only when a run went on where another platform gives other
    bits, "Target reached" only where the study has a target.
    """
    rows = [_cells(r) for r in table.to_pylist()]
    if observed is not None:
        by_label = {r["label"]: r for r in observed.to_pylist()}
        for cells in rows:
            o = by_label.get(cells["Method"], {})
            ratio, seconds, until = o.get("peak_ratio"), o.get("seconds"), o.get("seconds_to_target")
            excess = o.get("peak_excess")
            cells["Measured peak (MiB)"] = mib(o.get("measured_peak")) + over(excess)
            cells["Largest excess (%)"] = percent(excess, 1) if excess else amount(excess)
            cells["Measured / predicted"] = "" if ratio is None else f"{ratio:.3f}"
            cells["Time (s)"] = "" if seconds is None else f"{seconds:.1f}"
            cells["of it capturing steps (s)"] = "" if o.get("captured") is None else f"{o['captured']:.1f}"
            cells["Time to target (s)"] = "" if until is None else f"{until:.1f}"
    headers = [h for h in rows[0] if h not in OPTIONAL or any(r[h] not in ("", OPTIONAL[h]) for r in rows)]
    return Shown(headers, [[r[h] for h in headers] for r in rows])


def split(shown: Shown, at: str) -> tuple[Shown, Shown]:
    """The columns before the header `at`, and those from it on; both begin with the first column."""
    i = shown.headers.index(at)
    left = Shown(shown.headers[:i], [row[:i] for row in shown.rows])
    return left, Shown([shown.headers[0], *shown.headers[i:]], [[row[0], *row[i:]] for row in shown.rows])


def markdown(shown: Shown, note: str) -> str:
    """A GitHub table, names escaped, with a note below."""
    lines = [[re.sub(r"([\\`*_|<>])", r"\\\1", c) for c in row] for row in [shown.headers, *shown.rows]]
    lines.insert(1, ["---"] + ["---:"] * (len(shown.headers) - 1))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note.replace('*', chr(92) + '*')}\n"


def tex_escape(text: str) -> str:
    """Text as LaTeX sets it literally; `±` and `†` as formulas, so that any engine has them."""
    escaped = re.sub(r"[\\~^]|([&%$#_{}])", lambda m: rf"\{m[1]}" if m[1] else _TEX[m[0]], text)
    return escaped.replace("±", r"$\pm$").replace(OVER, r"$\dagger$")


def latex(shown: Shown, note: str) -> str:
    """A `tabular` for booktabs."""
    lines = [" & ".join(tex_escape(c) for c in row) + r" \\" for row in [shown.headers, *shown.rows]]
    body = [lines[0], r"\midrule", *lines[1:]]
    columns = "l" + "r" * (len(shown.headers) - 1)
    head = [f"% {note}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    return "\n".join([*head, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def html(shown: Shown) -> str:
    """A table in a box of its own, which scrolls sideways in a narrow window."""
    head = "".join(f"<th>{escape(h)}</th>" for h in shown.headers)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>\n" for row in shown.rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'
