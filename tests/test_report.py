"""The table, figures and report of hand-made run folders: two methods, three seeds, eight clients, four budgets."""

import io
import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import yaml
from rich.console import Console
from scipy import stats

from fedpipe.config import Study
from fedpipe.errors import FedpipeError
from fedpipe.io import read_table, table_meta, write_table, write_text
from fedpipe.memory.parts import KINDS
from fedpipe.paths import RunPaths, StudyPaths
from fedpipe.report import cells, peaks, peaks_picture, terminal
from fedpipe.report.claims import remarks
from fedpipe.report.intervals import holm, p_value
from fedpipe.report.plan_picture import Group, groups
from fedpipe.report.results import load, load_all
from fedpipe.report.summaries import curves, observed, summary
from fedpipe.steps import report, table

MIB = 2**20
UNITS = ["stem", *(f"b{i}" for i in range(1, 10)), "head"]
ACCURACY = {"fedavg_ft": [0.50, 0.53, 0.47], "fedepth": [0.61, 0.63, 0.60]}
# Budgets in MiB, and the units FeDepth trains per phase under them.
BLOCKS = {
    5: [["stem", "b1"], ["b2"], ["b3", "b4"], ["b5", "b6", "b7", "b8", "b9"]],
    7: [["stem", "b1", "b2"], ["b3", "b4"], ["b5", "b6", "b7", "b8", "b9"]],
    10: [["stem", "b1", "b2", "b3"], ["b4", "b5", "b6", "b7", "b8", "b9"]],
    20: [["stem", *UNITS[1:-1]]],
}
PLAN = pa.schema(
    {
        **{"plan": pa.string(), "phase": pa.int32(), "name": pa.string()},
        **{k: pa.list_(pa.string()) for k in ("live", "down", "up", "fixed", "hold", "keep", "reply", "trains")},
        **{"model": pa.string(), "weight": pa.string(), "predicted": pa.int64()},
        **dict.fromkeys(KINDS, pa.int64()),
    }
)
ASSIGNMENT = pa.schema(
    {
        **{"client": pa.int32(), "round": pa.int32(), "plan": pa.string(), "budget": pa.int64(), "group": pa.int32()},
        **{"samples": pa.int32(), "predicted": pa.int64(), "needs": pa.int64()},
    }
)
ROUND = pa.schema(
    {
        **{"round": pa.int32(), "client": pa.int32(), "part": pa.string(), "plan": pa.string(), "phase": pa.int32()},
        **{"payload_up": pa.int64(), "header_up": pa.int64(), "payload_down": pa.int64(), "header_down": pa.int64()},
        **{"failed": pa.bool_(), "steps": pa.int32()},
    }
)
CURVE = pa.schema({"round": pa.int32(), "loss": pa.float64(), "accuracy": pa.float64(), "samples": pa.int32()})
METRIC = pa.schema({"client": pa.int32(), "column": pa.string(), **{k: CURVE.field(k).type for k in CURVE.names[1:]}})
PEAK = pa.schema(
    {
        **{"round": pa.int32(), "client": pa.int32(), "plan": pa.string(), "phase": pa.int32()},
        **{"predicted": pa.int64(), "measured": pa.int64(), "budget": pa.int64(), "resident": pa.int64()},
    }
)
SECONDS = pa.schema(
    {"round": pa.int32(), "seconds": pa.float64(), "captured": pa.float64(), "host": pa.string(), "date": pa.string()}
)


def small_study(seeds: list[int], **more: Any) -> Study:
    raw = {
        "name": "small_study",
        "data": {"name": "digits", "partition": {"clients": 8}},
        "methods": list(ACCURACY),
        "rounds": 4,
        "cohort": 2,
        "budgets": {"bytes": {f"{b}MiB": 2 for b in BLOCKS}},
        "seeds": seeds,
        "paper": {"fedepth": 0.65},
    }
    return Study.model_validate({**raw, **more})


def phases(method: str, budget: int) -> list[list[str]] | None:
    """Units trained per phase; FedAvg trains all at once, which only 20 MiB hold."""
    if method == "fedepth":
        return [[*units, "head"] for units in BLOCKS[budget]]
    return [UNITS] if budget == 20 else None


def write_run(paths: RunPaths) -> None:
    run, folder = paths.run, paths.folder
    meta = {
        "method": run.method.name,
        "label": run.label,
        "seed": run.seed,
        "platform": "torch 2.13, cpu AVX512, threads 1",
    }
    plans, assignment = [], []
    for g, budget in enumerate(BLOCKS):
        trains = phases(run.method.name, budget)
        fields: dict[str, Any] = {"budget": budget * MIB, "group": g, "samples": 10, "round": 0}
        peak: dict[str, Any] = {"plan": f"p{g}", "predicted": (budget - 1) * MIB} if trains else {"needs": 18 * MIB}
        assignment += [{**fields, **peak, "client": 2 * g + i} for i in (0, 1)]
        for i, units in enumerate(trains or []):
            words: dict[str, Any] = {
                "live": [f"model/{u}.*" for u in units],
                "down": ["model/*"],
                "up": ["model/*"],
                "name": "train",
            }
            words |= {"trains": units, "model": "{}", "weight": "samples", "predicted": (budget - 1) * MIB - i * MIB}
            words |= dict.fromkeys(KINDS, 0) | {"parameters": MIB, "activations": words["predicted"] - MIB}
            plans.append({"plan": f"p{g}", "phase": i, **words})
    write_table(paths.plans, plans, {**meta, "units": UNITS}, PLAN)
    write_table(paths.assignment, assignment, meta, ASSIGNMENT)
    taking_part = {a["client"]: a["plan"] for a in assignment if "plan" in a}
    rows = [round_row(t, c, taking_part[c]) for t in (0, 1, 3) for c in (6, 7)]
    rows[0]["failed"] = run.seed == 1
    for last in (2, 4):
        write_table(paths.rounds(last), [r for r in rows if last - 2 <= r["round"] < last], meta, ROUND)
    accuracy = ACCURACY[run.method.name][run.seed]
    points = [
        {"round": t, "loss": 2.0 - accuracy, "accuracy": 0.1 + (accuracy - 0.1) * t / 4, "samples": 80}
        for t in range(5)
    ]
    write_table(paths.curve(2), points[:3], meta, CURVE)
    write_table(paths.curve(4), points[3:], meta, CURVE)
    write_table(paths.metrics, metric_rows(run.method.name, accuracy), meta, METRIC)
    write_observations(folder, plans)


def round_row(t: int, client: int, plan: str) -> dict[str, Any]:
    sent = {"payload_up": 3 * MIB, "header_up": 1024, "payload_down": 4 * MIB, "header_down": 2048}
    return {"round": t, "client": client, "part": "", "plan": plan, "phase": 0, "steps": 7, **sent, "failed": False}


def metric_rows(method: str, accuracy: float) -> list[dict[str, Any]]:
    pooled: dict[str, Any] = {
        "client": None,
        "column": "global",
        "loss": 2.0 - accuracy,
        "accuracy": accuracy,
        "samples": 80,
    }
    rows = [pooled]
    for c in range(8):
        own = {
            "client": c,
            "column": "global",
            "loss": 1.0,
            "accuracy": accuracy + (0.1 if c % 2 else -0.1),
            "samples": 10,
        }
        rows += [own, {**own, "column": "personal", "accuracy": 0.9}] if method == "fedepth" else [own]
    return rows


def write_observations(folder: Path, plans: list[dict[str, Any]]) -> None:
    names = [p for p in plans if p["plan"] == "p3"]
    fixed = {"round": 0, "client": 6, "budget": 20 * MIB, "resident": 2 * MIB}
    peaks = [
        {**fixed, **{k: p[k] for k in ("plan", "phase", "predicted")}, "measured": int(p["predicted"] * 0.98)}
        for p in names
    ]
    write_table(folder / "rounds" / "000002.peaks.obs.parquet", peaks, {}, PEAK)
    for last in (2, 4):
        rows = [
            {"round": t, "seconds": 0.5, "captured": 0.1, "host": "h", "date": "2026-01-01"}
            for t in range(last - 2, last)
        ]
        write_table(folder / "rounds" / f"{last:06d}.obs.parquet", rows, {}, SECONDS)


HISTOGRAM = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10"><title>labels</title>
<rect id="a" width="9" height="9"/></svg>"""


def write_study(root: Path, study: Study) -> StudyPaths:
    paths = StudyPaths(root, study)
    paths.write_specs()
    for run in paths.runs:
        write_run(run)
        write_text(run.clients.with_name("histogram.svg"), HISTOGRAM)
    return paths


def make_all(paths: StudyPaths) -> None:
    folders = [r.folder for r in paths.runs]
    table.run(paths.spec, folders, table=paths.table)
    report.run(paths.spec, paths.table, folders, report=paths.report)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> StudyPaths:
    paths = write_study(tmp_path_factory.mktemp("results"), small_study([0, 1, 2]))
    make_all(paths)
    return paths


def row(made: StudyPaths, label: str) -> dict[str, Any]:
    return next(r for r in read_table(made.table).to_pylist() if r["label"] == label)


def files(root: Path) -> dict[str, bytes]:
    kinds = ("table*", "report.html", "figures/*")
    return {f.relative_to(root).as_posix(): f.read_bytes() for kind in kinds for f in root.glob(kind)}


def test_summary_of_one_run(made: StudyPaths) -> None:
    one = summary(load(made.runs[1].folder))  # fedavg_ft, seed 1
    assert (one["label"], one["seed"], one["accuracy"]) == ("fedavg_ft", 1, 0.53)
    assert (one["clients"], one["taking_part"], one["left_out"]) == (8, 2, 6)
    assert (one["idle_rounds"], one["rounds"], one["failed_updates"]) == (1, 4, 1)
    assert [one[b] for b in ("payload_up", "header_up", "payload_down", "header_down")] == [
        6 * n for n in (3 * MIB, 1024, 4 * MIB, 2048)
    ]
    assert (one["predicted_peak"], one["phases"], one["over_budget"]) == (19 * MIB, 1, 0)
    assert one["client_accuracy"] == pytest.approx(0.53) and one["client_spread"] == pytest.approx(0.1)
    assert one["personal_accuracy"] is None and one["personal_spread"] is None
    assert summary(load(made.runs[3].folder))["personal_accuracy"] == pytest.approx(0.9)


def test_observations_stand_apart(made: StudyPaths) -> None:
    one = observed(load(made.runs[0].folder))
    assert one["measured_peak"] == int(19 * MIB * 0.98) and one["seconds"] == 2.0
    assert one["peak_ratio"] == pytest.approx(0.98, abs=1e-6)
    names = read_table(made.table).column_names
    assert not {"measured_peak", "peak_ratio", "seconds"} & set(names)
    assert read_table(made.table.with_suffix(".obs.parquet"))["seconds"].to_pylist() == [2.0, 2.0]


def test_unknown_is_null_not_zero(made: StudyPaths, tmp_path: Path) -> None:
    folder = write_study(tmp_path, small_study([0], methods=["fedepth"])).runs[0].folder
    for file in (folder / "rounds").glob("*.obs.parquet"):
        file.unlink()
    assert [observed(load(folder))[k] for k in ("measured_peak", "peak_ratio", "seconds")] == [None] * 3


def test_overlapping_files_of_rounds_count_once(tmp_path: Path) -> None:
    paths = write_study(tmp_path, small_study([0], methods=["fedepth"])).runs[0]
    before = summary(load(paths.folder))
    both = pa.concat_tables([read_table(paths.rounds(2)), read_table(paths.rounds(4))])
    meta = table_meta(read_table(paths.rounds(4)))
    write_table(paths.rounds(4), both, meta)
    assert summary(load(paths.folder)) == before


def test_rounds_of_an_older_run_are_passed_over(tmp_path: Path) -> None:
    paths = write_study(tmp_path, small_study([0], methods=["fedepth"])).runs[0]
    older = table_meta(read_table(paths.rounds(2))) | {"key": "of an older run"}
    write_table(paths.rounds(2), read_table(paths.rounds(2)), older)
    assert {r["round"] for r in load(paths.folder).rounds} == {3}


def test_bytes_of_a_curve_are_those_sent_before_its_state(made: StudyPaths) -> None:
    points = [r for r in curves([load(made.runs[0].folder)]).to_pylist()]
    a_round = 2 * (7 * MIB + 3072)  # two clients in rounds 0, 1 and 3; nobody in round 2
    assert [p["round"] for p in points] == [0, 1, 2, 3, 4]
    assert [p["sent"] for p in points] == [0, a_round, 2 * a_round, 2 * a_round, 3 * a_round]


def test_mean_and_interval_over_seeds(made: StudyPaths) -> None:
    r, values = row(made, "fedepth"), ACCURACY["fedepth"]
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert r["seeds"] == 3 and r["accuracy"] == pytest.approx(0.61333333)
    assert r["accuracy_std"] == pytest.approx(0.01527525)
    assert (r["accuracy_low"], r["accuracy_high"]) == pytest.approx((low, high), rel=1e-12)
    assert r["accuracy_low"] == pytest.approx(0.575388, abs=1e-6)


def test_difference_is_paired_over_seeds(made: StudyPaths) -> None:
    r, pairs = row(made, "fedepth"), [0.11, 0.10, 0.13]
    test = stats.ttest_rel(ACCURACY["fedepth"], ACCURACY["fedavg_ft"]).confidence_interval(0.95)
    assert r["accuracy_diff"] == pytest.approx(sum(pairs) / 3)
    assert (r["accuracy_diff_low"], r["accuracy_diff_high"]) == pytest.approx((test.low, test.high), rel=1e-9)
    assert r["accuracy_differs"] is True
    assert [row(made, "fedavg_ft")[f"accuracy_{k}"] for k in ("diff", "diff_low", "differs")] == [None] * 3


@pytest.mark.parametrize(("values", "claimed"), [([0.1, 0.2, 0.15], True), ([-0.1, 0.2, 0.15], False), ([0.3], None)])
def test_a_difference_is_claimed_only_when_its_interval_excludes_0(values: list[float], claimed: bool | None) -> None:
    first = [{"seed": s, "accuracy": 0.5} for s in range(len(values))]
    mine = [{"seed": s, "accuracy": 0.5 + v} for s, v in enumerate(values)]
    assert table._difference(mine, first, "accuracy")["accuracy_differs"] is claimed


def test_p_values_are_of_the_paired_test_and_adjusted_over_the_column(made: StudyPaths) -> None:
    wanted = stats.ttest_rel(ACCURACY["fedepth"], ACCURACY["fedavg_ft"]).pvalue
    assert row(made, "fedepth")["accuracy_p"] == pytest.approx(wanted) and wanted < 0.01
    assert row(made, "fedavg_ft")["accuracy_p"] is None and p_value([0.3]) is None
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and p_value([0.2, 0.2]) == 0.0


ANCHORS = {"above": "fedepth", "below": "fedavg_ft"}
CLAIM = {"method": "fedepth", "against": ["fedavg_ft"], "published": "more than +5 points"}


def said(root: Path, seeds: list[int], **keys: Any) -> list[str]:
    paths = write_study(root, small_study(seeds, **keys))
    results = load_all(paths.study, [r.folder for r in paths.runs])
    return remarks(paths.study, [summary(r) for r in results])


def test_a_table_says_whether_its_anchors_hold(tmp_path: Path) -> None:
    assert said(tmp_path, [0, 1, 2], anchors=ANCHORS) == [
        "Anchors hold: fedepth is more than two standard errors above fedavg_ft."
    ]
    turned = {"above": "fedavg_ft", "below": "fedepth", "others": ["fedavg_ft"]}
    (void,) = said(tmp_path, [0, 1, 2], anchors=turned)
    assert void == (
        "This table is void: fedavg_ft is not more than two standard errors above fedepth; fedavg_ft is more than two"
        " standard errors below fedepth."
    )
    (one,) = said(tmp_path, [0], anchors={**ANCHORS, "others": ["fedepth"]})
    assert one.startswith("This table is void"), "one seed shows nothing"
    assert one.endswith("; fedepth has no two seeds in common with fedavg_ft.")


def test_a_claim_is_tested_beside_what_was_published(tmp_path: Path) -> None:
    test = stats.ttest_rel(ACCURACY["fedepth"], ACCURACY["fedavg_ft"]).confidence_interval(0.95)
    (text,) = said(tmp_path, [0, 1, 2], claims=[CLAIM])
    found = f"+11.33 points [{100 * test.low:+.2f}, {100 * test.high:+.2f}], the interval excludes 0"
    assert text == f"fedepth against fedavg_ft: {found}. Published: more than +5 points."
    against = {**CLAIM, "method": "fedavg_ft", "against": ["fedepth", "fedavg_ft"]}
    (other,) = said(tmp_path, [1], claims=[against])
    assert other.startswith("fedavg_ft against fedepth, the best of fedepth, fedavg_ft: -10.00 points. Published")


def test_entries_that_anchors_name_must_be_there() -> None:
    with pytest.raises(ValueError, match="anchors, claims: no entry 'heterofl'; there are fedavg_ft, fedepth"):
        small_study([0], anchors={**ANCHORS, "below": "heterofl"})


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    paths = write_study(tmp_path, small_study([1]))
    results = load_all(paths.study, [r.folder for r in paths.runs])
    rows = table.tabulate(paths.study, results)
    second = rows.to_pylist()[1]
    assert second["accuracy"] == 0.63 and second["accuracy_diff"] == pytest.approx(0.10)
    assert [second[f"accuracy_{k}"] for k in ("std", "low", "high", "diff_low", "differs")] == [None] * 5
    shown = cells.present(rows)
    assert shown.rows[1][shown.headers.index("Accuracy (%)")] == "63.00"
    assert shown.rows[1][shown.headers.index("Difference (points)")] == "+10.00"


def test_paper_and_unknown_cells(made: StudyPaths) -> None:
    shown = cells.present(read_table(made.table))
    at = {h: [r[i] for r in shown.rows] for i, h in enumerate(shown.headers)}
    assert at["Paper (%)"] == ["", "65.00"] and at["Personal (%)"] == ["", "90.0 ± 0.0"]
    assert at["Difference (points)"][0] == "" and at["Difference (points)"][1].startswith("+11.33 [")
    assert at["Difference (points)"][1].endswith("] *")
    assert at["Taking part"] == ["2 of 8", "8 of 8"] and at["Idle rounds"] == ["1 of 4", "1 of 4"]
    assert at["Payload up / down (MiB)"][0] == "18.00 / 24.00" and at["Headers up / down (MiB)"][0] == "0.006 / 0.012"


def test_markdown_and_latex_escape(made: StudyPaths) -> None:
    text, tex = made.table.with_suffix(".md").read_text(), made.table.with_suffix(".tex").read_text()
    assert r"| fedavg\_ft | 3 | 50.00 [42.55, 57.45] |" in text and r"\*" in text
    assert r"fedavg\_ft & 3 &" in tex and r"Accuracy (\%)" in tex and r"90.0 $\pm$ 0.0" in tex
    body = tex.split("\n", 1)[1]
    assert not re.search(r"(?<!\\)[%_#$](?!\\pm)", body.replace(r"\pm$", r"\pm"))
    assert cells.tex_escape(r"a_b % {c} \ ~^&#$") == (
        r"a\_b \% \{c\} \textbackslash{} \textasciitilde{}\textasciicircum{}\&\#\$"
    )


@pytest.mark.parametrize("paper", [{"fedepth": 65.0}, {"fedrolex": 0.5}])
def test_paper_of_no_method_or_in_percent_is_refused(tmp_path: Path, paper: dict[str, float]) -> None:
    paths = write_study(tmp_path, small_study([0], paper=paper))
    with pytest.raises(FedpipeError, match=f"paper.{next(iter(paper))}: wanted one of the study's methods"):
        table.tabulate(paths.study, load_all(paths.study, [r.folder for r in paths.runs]))


def test_missing_run_or_file_is_named(made: StudyPaths, tmp_path: Path) -> None:
    folders = [r.folder for r in made.runs]
    with pytest.raises(FedpipeError, match=re.escape(str(tmp_path / "gone"))):
        table.run(made.spec, [*folders, tmp_path / "gone"], table=tmp_path / "table.parquet")
    with pytest.raises(FedpipeError, match=f"runs/{folders[-1].name}"):
        table.run(made.spec, folders[:-1], table=tmp_path / "table.parquet")
    unfinished = write_study(tmp_path, small_study([0], methods=["fedepth"])).runs[0]
    unfinished.metrics.unlink()
    with pytest.raises(FedpipeError, match=re.escape(str(unfinished.metrics))):
        load(unfinished.folder)
    assert not (tmp_path / "table.parquet").exists()


def test_pictures_exist(made: StudyPaths) -> None:
    names = ["accuracy_rounds", "accuracy_bytes", "accuracy_clients", "plans_fedavg_ft", "plans_fedepth"]
    found = sorted(f.name for f in (made.root / "figures").iterdir())
    assert found == sorted(f"{n}.{kind}" for n in names for kind in ("svg", "png"))
    assert all(f.stat().st_size > 5000 for f in (made.root / "figures").iterdir())


def test_the_largest_phase_of_every_budget(made: StudyPaths) -> None:
    rows = peaks.largest([load(r.folder) for r in made.runs])
    assert [(r.run.run.label, r.group.budget) for r in rows] == [(label, b * MIB) for label in ACCURACY for b in BLOCKS]
    assert [r.predicted and r.predicted // MIB for r in rows] == [None, None, None, 19, 4, 6, 9, 19]
    assert [r.measured for r in rows] == [None] * 3 + [int(19 * MIB * 0.98)] + [None] * 3 + [int(19 * MIB * 0.98)]
    shown = peaks.by_budget(rows)
    assert shown.rows[0] == ["preresnet20", "fedavg_ft", "none", "5.00", "left out", "", ""]
    assert shown.rows[-1] == ["preresnet20", "fedepth", "none", "20.00", "1", "19.00", "18.62"]
    drawn = peaks_picture.draw(rows)
    (ax,) = drawn.axes
    assert sum(p.get_width() for p in ax.patches) == pytest.approx(19 + 4 + 6 + 9 + 19)
    marks = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D"]
    limits = [line.get_xdata()[0] for line in ax.lines if line.get_marker() != "D"]
    assert marks == pytest.approx([18.62, 18.62], abs=0.01) and limits == [*BLOCKS, *BLOCKS]
    assert sum(t.get_text() == "left out" for t in ax.texts) == 3


def test_plan_picture_rows(made: StudyPaths) -> None:
    depth, width = (load(made.runs[i].folder) for i in (3, 0))
    rows = groups(depth.plans_table, depth.assignment_table)
    assert [(g.title, g.clients, len(g.phases)) for g in rows] == [
        ("5 MiB", 2, 4),
        ("7 MiB", 2, 3),
        ("10 MiB", 2, 2),
        ("20 MiB", 2, 1),
    ]
    assert rows[0].trained("b2") == [1] and rows[0].trained("head") == [0, 1, 2, 3] and rows[0].held("b9")
    out = groups(width.plans_table, width.assignment_table)
    assert [g.needs for g in out] == [18 * MIB] * 3 + [None] and not out[0].held("stem")


def test_held_but_never_trained() -> None:
    phase = {"trains": ["b1"], "down": ["model/*", "!model/b3.*"], "fixed": [], "keep": [], "model": "{}"}
    group = Group(None, 1, None, [phase])
    assert [bool(group.trained(u)) for u in ("b1", "b2", "b3")] == [True, False, False]
    assert [group.held(u) for u in ("b1", "b2", "b3")] == [True, True, False]
    assert group.title == "no limit" and group.subtitle == "1 client"


def test_report_is_self_contained_and_whole(made: StudyPaths) -> None:
    html = made.report.read_text()
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!#)[^"']*|url\((?!#)[^)]*|@import|<script|<link""", html)
    assert not outside
    uris = set(re.findall(r"https?://[^\s\"'<]+", html))
    assert uris <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    sections = ["Results", "Plans", "Who took part", "Accuracy over rounds", "Accuracy against bytes"]
    sections += ["Accuracy per client", "Peak memory, predicted and measured", "Labels per client", "Versions"]
    assert re.findall(r"<h2>(.*?)</h2>", html) == [*sections, "How to run it again"]
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and html.count("<svg") == 7
    assert "2026-01-01" not in html


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"budgets": {}}, "No client has a memory limit."),
        (
            {},
            "Memory budgets: 5 MiB for 2 clients, 7 MiB for 2 clients, 10 MiB for 2 clients and 20 MiB for 2 clients.",
        ),
        (
            {"budgets": {"scenario": "surplus"}, "budget": "off"},
            "Memory budgets (scenario surplus): width 1/6 for 2 clients, width 1/3 for 2 clients, width 0.5 for 2"
            " clients and fraction 2 for 2 clients. A width stands for what training a model of that width needs. A"
            " fraction is one of what training the full model needs. They limit nothing.",
        ),
        (
            {"budgets": {"devices": [{"name": "phone", "bytes": "0.5GiB", "share": 1}]}, "budget": "warn"},
            "Memory budgets: phone (512 MiB) for 8 clients. What is over its budget goes on and is marked.",
        ),
    ],
)
def test_report_says_what_budgets_there_are(keys: dict[str, Any], said: str) -> None:
    assert report.statement(small_study([0], **keys)).endswith(said)


def test_report_says_who_was_left_out_and_how_to_run_again(made: StudyPaths) -> None:
    html = unescape(made.report.read_text())
    out = "6 of 8 clients left out (budgets of 5 MiB, 7 MiB and 10 MiB, 18 MiB needed); 1 of 4 rounds idle"
    assert f"fedavg_ft, seeds 0 and 2: {out}" in html
    assert "fedepth, seeds 0 and 2: all 8 clients took part" in html and "1 failed update taken out" in html
    assert "trained on</td><td>torch 2.13, cpu AVX512, threads 1" in html
    assert "<pre>fedpipe run small_study.yaml</pre>" in html
    for text in re.findall(r"</summary><pre>(.*?)</pre>", html, re.DOTALL):
        assert Study.model_validate(yaml.safe_load(text)) == made.study
    measured = ["fedepth", "p3", "1", "20.00", "19.00", "18.62", "0.980", "2.00", "3"]
    assert "".join(f"<td>{c}</td>" for c in measured) in html


def test_run_twice_gives_the_same_bytes(made: StudyPaths) -> None:
    before = files(made.root)
    for name in before:
        (made.root / name).unlink()
    make_all(made)
    assert files(made.root) == before


def test_terminal_table(made: StudyPaths) -> None:
    for width, first in ((400, "Seeds"), (80, "fedavg_ft"), (60, "Method")):
        text = io.StringIO()
        out = Console(file=text, width=width, force_terminal=True, color_system=None)
        terminal.print_table(made.table, out)
        lines = text.getvalue().splitlines()
        head = " ".join(lines[:4])
        assert "Method" in head and first in head and max(map(len, lines)) <= width
        assert ("0.006 / 0.012" in text.getvalue()) is (width > 60)


def test_progress_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 1.0, 6.0, 8.0, 10.0])
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with terminal.Progress("fedepth seed 0", 10, start=6) as p:
        for done, accuracy in ((7, None), (8, 0.8149), (9, None), (10, None)):
            p.advance(done, accuracy)
    assert capsys.readouterr().err.splitlines() == [
        "fedepth seed 0: round 8/10, accuracy 0.81, about 6 s left",
        "fedepth seed 0: round 10/10, accuracy 0.81",
    ]


def test_durations() -> None:
    assert [terminal.duration(s) for s in (14, 200, 7500)] == ["14 s", "3 min 20 s", "2 h 5 min"]
