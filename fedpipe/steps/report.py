"""Step `report`: one HTML page of a study, with its pictures and style inside. A view: no step reads it."""

import platform
import re
from collections.abc import Iterable, Iterator
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from fedpipe.config import Study
from fedpipe.errors import FedpipeError
from fedpipe.io import BLANK, read_meta, read_table, write_sealed
from fedpipe.paths import RunPaths
from fedpipe.report import cells, peaks_picture
from fedpipe.report.figures import drawn, plan_file
from fedpipe.report.page import inline, page
from fedpipe.report.peaks import largest, measured_peaks
from fedpipe.report.results import RunResults, load_all
from fedpipe.steps import measured, provenance
from fedpipe.steps.table import pictured
from fedpipe.studyfile import load_study

PACKAGES = ("fedpipe", "torch", "numpy", "pyarrow", "safetensors", "snakemake")


def _plural(count: float, word: str) -> str:
    return f"{cells.amount(count)} {word}{'' if count == 1 else 's'}"


def _listed(items: Iterable[Any]) -> str:
    words = [str(i) for i in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _size(count: int) -> str:
    return f"{count / 2**20:.4g} MiB"


def _budgets(study: Study) -> Iterator[str]:
    limits = [(limit, n) for limit, n in study.budgets.limits(study.data.partition.clients) if n]
    if not limits:
        yield "No client has a memory limit."
        return
    devices = {d.name: f"{d.name} ({_size(d.bytes)})" for d in study.budgets.fleet}
    each = [f"{devices.get(limit.name, limit.name)} for {_plural(n, 'client')}" for limit, n in limits]
    yield f"Memory budgets{f' (scenario {s})' if (s := study.budgets.scenario) else ''}: {_listed(each)}."
    kinds = {limit.kind for limit, _ in limits}
    if "width" in kinds:
        yield "A width stands for what training a model of that width needs."
    if "fraction" in kinds:
        yield "A fraction is one of what training the full model needs."
    if study.budget != "enforce":
        yield "What is over its budget goes on and is marked." if study.budget == "warn" else "They limit nothing."


def statement(study: Study) -> str:
    """What was run, as one paragraph."""
    data, part, local, sgd = study.data, study.data.partition, study.local, study.local.optimizer
    seeds = list(dict.fromkeys(r.seed for r in study.compared()))
    known = {"dirichlet": f"Dirichlet, alpha {part.alpha}", "shards": f"{part.shards} shards each"}
    return (
        f"{_listed(dict.fromkeys(r.label for r in study.compared()))} on {data.name}, shared out among"
        f" {part.clients} clients ({known.get(part.kind, part.kind)}): {study.model.name} is trained for"
        f" {_plural(study.rounds, 'round')} with {_plural(study.cohort, 'client')} drawn in each,"
        f" {_plural(local.epochs, 'local epoch')} in batches of {local.batch}, {sgd.name} with"
        f" learning rate {sgd.lr} and momentum {sgd.momentum}, repeated with"
        f" {_plural(len(seeds), 'seed')} ({_listed(seeds)}). {' '.join([*_budgets(study), *_conditions(study)])}"
    )


def _conditions(study: Study) -> Iterator[str]:
    if study.availability < 1:
        yield f"A client that is drawn is there with probability {study.availability}."
    if study.dropout:
        yield f"One that has trained drops out, its update lost, with probability {study.dropout}."
    if study.stop:
        rows = "validation" if study.data.partition.val else "test"
        until = f"reaches {study.stop.target}" if study.stop.target is not None else "gets better no more"
        yield f"A run stops when the {study.stop.metric} on {rows} rows {until}."
    if study.select:
        yield f"Grids are tuned on validation rows, at seed {study.select.seed}, which the comparison leaves out."


def words_on(run: RunResults) -> str:
    """Who was left out of one run and why, its idle rounds and failed updates, as one sentence."""
    clients = len({r["client"] for r in run.assignment})
    said = [_left_out(run, clients) if run.left_out else f"all {clients} clients took part"]
    if run.idle:
        said.append(f"{run.idle} of {run.length} rounds idle: nobody drawn could train, the model stayed as it was")
    else:
        said.append(f"somebody trained in each of the {run.length} rounds")
    if run.stopped is not None:
        said.append(f"stopped at round {run.stopped} of {run.run.rounds}")
    if failed := len({(r["round"], r["client"], r["part"]) for r in run.rounds if r["failed"]}):
        said.append(f"{_plural(failed, 'failed update')} taken out of the mean")
    return "; ".join(said)


def _left_out(run: RunResults, clients: int) -> str:
    budgets = sorted({r["budget"] for r in run.left_out if r["budget"] is not None})
    needs = max((r["needs"] for r in run.left_out if r["needs"] is not None), default=None)
    why = [f"budgets of {_listed(_size(b) for b in budgets)}"] if budgets else []
    why += [f"{_size(needs)} needed"] if needs is not None else []
    return f"{len(run.left_out)} of {clients} clients left out" + (f" ({', '.join(why)})" if why else "")


def _who(runs: list[RunResults]) -> str:
    """One item for the seeds of a method of which the same is to be said."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for run in runs:
        seeds.setdefault((run.run.label, words_on(run)), []).append(run.run.seed)
    items = [f"{k}, seed{'s' if len(s) > 1 else ''} {_listed(s)}: {words}." for (k, words), s in seeds.items()]
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _picture(file: Path, title: str) -> str:
    if not file.is_file():
        raise FedpipeError(f"{file}: no such file; the step that writes it has not run")
    return inline(file.read_text(), re.sub(r"\W+", "-", file.stem), title)


def _notes(*texts: str) -> str:
    return "".join(f'<p class="note">{escape(t)}</p>' for t in texts)


def _memory(runs: list[RunResults]) -> str:
    peaks, rows = measured_peaks(runs), largest(runs)
    picture = drawn(peaks_picture.draw(rows), "svg").decode()
    table = cells.html(peaks) if peaks.rows else "<p>No peak was measured.</p>"
    return inline(picture, "peaks", "peak memory by method and budget") + table


def _histogram(run: RunResults) -> str:
    root = run.folder.parent.parent
    file = RunPaths(root, run.run).clients.with_name("histogram.svg")
    said = f"<p>Of seed {run.run.seed}; the other seeds are drawn in the same way.</p>"
    return said + _picture(file, "labels per client")


def _versions(runs: list[RunResults]) -> str:
    rows = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    said = dict.fromkeys(p for r in runs for p in r.platforms)
    rows += [("trained on", text) for text in said]
    body = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in rows)
    return f'<div class="wide"><table class="facts"><tbody>{body}</tbody></table></div>'


def _again(study: Study) -> str:
    file = f"{study.name}.yaml"
    said = [(f"The study ({file})", True), ("The same with every default written out", False)]
    out = f"<p>Save the study below as <code>{file}</code>, then in one process</p><pre>fedpipe run {file}</pre>"
    out += f"<p>or by the workflow</p><pre>snakemake --cores 2 --config study={file}</pre>"
    for title, short in said:
        text = yaml.safe_dump(study.model_dump(mode="json", exclude_defaults=short), sort_keys=False)
        out += f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
    return out


def sections(study: Study, runs: list[RunResults], table: Path) -> list[tuple[str, str]]:
    """Title and HTML of each section. `table` has its observations and figures beside it."""
    drawn = table.parent / "figures"
    shown = cells.present(read_table(table), read_table(table.with_suffix(".obs.parquet")))
    scores, rest = cells.split(shown, "Taking part")
    tables = [scores, *cells.split(rest, "Payload up / down (MiB)")]
    plans = [_picture(drawn / f"{plan_file(k)}.svg", f"plans of {k}") for k in pictured(runs)]
    return [
        ("Results", "".join(map(cells.html, tables)) + _notes(*read_meta(table)["remarks"], cells.note(shown))),
        ("Plans", "".join(plans) or "<p>Every client trains the whole model at once.</p>"),
        ("Who took part", _who(runs)),
        ("Accuracy over rounds", _picture(drawn / "accuracy_rounds.svg", "accuracy over rounds")),
        ("Accuracy against bytes", _picture(drawn / "accuracy_bytes.svg", "accuracy against bytes sent")),
        ("Accuracy per client", _picture(drawn / "accuracy_clients.svg", "accuracy per client")),
        ("Peak memory, predicted and measured", _memory(runs)),
        ("Labels per client", _histogram(runs[0])),
        ("Versions", _versions(runs)),
        ("How to run it again", _again(study)),
    ]


def run(study: Path, table: Path, runs: list[Path], *, report: Path) -> None:
    """Write report.html. `table` has its observations and figures beside it, `runs` are run folders."""
    spec = load_study(study)
    results = load_all(spec, runs)
    key = provenance("report", spec, [f for r in results for f in measured(r.folder)])["key"]
    write_sealed(report, page(spec.name, f"{key} {BLANK}", statement(spec), sections(spec, results, table)))
