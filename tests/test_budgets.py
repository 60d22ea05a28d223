"""Budgets of fleets: forms and what they resolve to; plans and clients over their budgets stop, are marked, or pass."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine import IID, Game, assigned, make_run
from pydantic import ValidationError

from fedpipe import io
from fedpipe.__main__ import main
from fedpipe.budgets import Budgets, Limit
from fedpipe.config import Local, Study
from fedpipe.data import dataset
from fedpipe.errors import FedpipeError
from fedpipe.memory import measure
from fedpipe.memory.enforce import Witness, judge_plans, plans_over
from fedpipe.memory.limit import SEGMENTS
from fedpipe.memory.parts import Parts
from fedpipe.paths import RunPaths
from fedpipe.runtime import Runtime
from fedpipe.steps.measure import widths_bytes
from fedpipe.studyfile import load_study

MIB = 2**20
PHONES = [{"name": "tablet", "bytes": "2GiB", "share": 0.25}, {"name": "phone", "bytes": "512MiB", "share": 0.75}]
STUDY: dict[str, Any] = {
    **IID,
    "model": {"name": "mlp", "hidden": [16]},
    "data": {**IID["data"], "size": 8},
    "rounds": 2,
    "measure": "all",
}
MINE = """
import torch
from fedpipe.loop.client import default_begin
from fedpipe.types import Method, Phase, Plan

def by_ratio(ctx):
    return Plan(phases=(Phase(steps=round(12 * ctx.row.ratio)),))

def more(at, ctx):
    extra = {"tmp/large": torch.zeros(10**6)} if (ctx.client, ctx.round) == (2, 1) else {}
    return {**default_begin(at, ctx), **extra}

careless = Method(plan=lambda ctx: Plan())
ratios = Method(plan=by_ratio)
growing = Method(begin=more)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(MINE)
    return str(file)


# -------------------------------------------------------------------------------------------------------------- forms
@pytest.mark.parametrize(
    ("keys", "clients", "limits"),
    [
        ({}, 3, []),
        ({"bytes": {"2MiB": 2, "1MiB": 1}}, 3, [("bytes", MIB, "1 MiB", 1), ("bytes", 2 * MIB, "2 MiB", 2)]),
        ({"like_width": {1: 1, "1/6": 2}}, 3, [("width", 1 / 6, "width 1/6", 2), ("width", 1, "width 1", 1)]),
        ({"like_width": {0.165: 3}}, 3, [("width", 0.165, "width 0.165", 3)]),
        (
            {"fraction": {0.25: 1, 1.0: 2}},
            3,
            [("fraction", 0.25, "fraction 0.25", 1), ("fraction", 1, "fraction 1", 2)],
        ),
        ({"fraction": {2.5: 3}, "surplus": True}, 3, [("fraction", 2.5, "fraction 2.5", 3)]),
        ({"devices": PHONES}, 8, [("bytes", 512 * MIB, "phone", 6), ("bytes", 2048 * MIB, "tablet", 2)]),
        ({"devices": PHONES}, 7, [("bytes", 512 * MIB, "phone", 5), ("bytes", 2048 * MIB, "tablet", 2)]),
        (
            {"scenario": "fair"},
            8,
            [("width", r, f"width {n}", 2) for r, n in ((1 / 6, "1/6"), (1 / 3, "1/3"), (0.5, "0.5"), (1, "1"))],
        ),
        (
            {"scenario": "lack"},
            4,
            [("width", r, f"width {n}", 1) for r, n in ((0.125, "0.125"), (1 / 6, "1/6"), (0.5, "0.5"), (1, "1"))],
        ),
        (
            {"scenario": "surplus"},
            4,
            [
                *(("width", r, f"width {n}", 1) for r, n in ((1 / 6, "1/6"), (1 / 3, "1/3"), (0.5, "0.5"))),
                ("fraction", 2, "fraction 2", 1),
            ],
        ),
    ],
)
def test_a_form_gives_limits_with_the_smallest_first(
    keys: dict[str, Any], clients: int, limits: list[tuple[str, float, str, int]]
) -> None:
    found = Budgets.model_validate(keys)
    assert [(x.kind, x.value, x.name, n) for x, n in found.limits(clients)] == limits
    study = Study.model_validate({**IID, "data": {"partition": {"clients": clients}}, "cohort": 1, "budgets": keys,
                                  "methods": ["fedavg"]})  # fmt: skip
    again = Study.model_validate_json(study.model_dump_json())
    assert again == study and again.budgets.limits(clients) == found.limits(clients)


@pytest.mark.parametrize("clients", [1, 2, 3, 5, 10, 40, 101])
def test_groups_of_a_scenario_are_quarters_in_order_of_clients(clients: int) -> None:
    counts = [n for _, n in Budgets(scenario="fair").limits(clients)]
    assert [g for g, n in enumerate(counts) for _ in range(n)] == [4 * i // clients for i in range(clients)]


@pytest.mark.parametrize(
    ("shares", "clients", "counts"),
    [
        ([0.5, 0.5], 3, [2, 1]),  # equal remainders: the smaller budget
        ([0.29, 0.71], 100, [29, 71]),  # 0.29 * 100 is less than 29
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([0.45, 0.35, 0.2], 10, [5, 3, 2]),
        ([0.333333, 0.333333, 0.333334], 10, [3, 3, 4]),
    ],
)
def test_devices_are_counted_by_the_largest_remainder(shares: list[float], clients: int, counts: list[int]) -> None:
    devices = [{"name": f"d{i}", "bytes": 10 + i, "share": s} for i, s in enumerate(shares)]
    assert [n for _, n in Budgets.model_validate({"devices": devices}).limits(clients)] == counts


def test_limits_resolve_to_bytes_and_a_ratio() -> None:
    needs = {0.5: 60, 1.0: 200}
    assert Limit("width", 0.5, "").resolve(needs) == (60, 0.5)
    assert Limit("fraction", 0.25, "").resolve(needs) == (50, 0.25)
    assert Limit("fraction", 2.0, "").resolve(needs) == (400, 2.0)
    assert Limit("bytes", 50, "").resolve(needs) == (50, 0.25)
    assert [Limit(k, 0.5, "").widths for k in ("width", "fraction", "bytes")] == [(0.5, 1.0), (1.0,), (1.0,)]


def phone(**keys: Any) -> list[dict[str, Any]]:
    return [{"name": "phone", "bytes": "1MiB", "share": 1.0, **keys}]


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"bytes": {}}, "at least 1 item"),
        ({"bytes": {"-1MiB": 3}}, "'-1MiB' is no size; write bytes, or a number with one of KiB MiB GiB"),
        ({"bytes": {float("nan"): 3}}, "nan is no size"),
        ({"bytes": {float("inf"): 3}}, "inf is no size"),
        ({"bytes": {True: 3}}, "True is no size"),
        ({"bytes": {"1MiB": 1, MIB: 2}}, f"{MIB} stands there twice"),
        ({"bytes": {"10000000000GiB": 3}}, "less than or equal to 1152921504606846976"),
        ({"fraction": {1e300: 3}, "surplus": True}, "less than or equal to 1000"),
        ({"bytes": {"1MiB": 0}}, "greater than or equal to 1"),
        ({"bytes": {"1MiB": True}}, "wanted a number"),
        ({"like_width": {0: 3}}, "greater than 0"),
        ({"like_width": {float("nan"): 3}}, "finite number"),
        ({"like_width": {"half": 3}}, "valid number"),
        ({"like_width": {"1/0": 3}}, "valid number"),
        ({"like_width": {"1/2": 1, 0.5: 2}}, "0.5 stands there twice"),
        ({"fraction": {1.5: 3}}, "fraction 1.5 is above 1; wanted at most 1, or surplus: true, too"),
        ({"fraction": {-0.5: 3}}, "greater than 0"),
        ({"fraction": {float("inf"): 3}, "surplus": True}, "finite number"),
        ({"bytes": {"1MiB": 3}, "surplus": True}, "surplus is given; wanted with fraction alone"),
        ({"scenario": "poor"}, "'fair', 'lack' or 'surplus'"),
        ({"scenario": "fair", "bytes": {"1MiB": 3}}, "bytes and scenario are given; wanted one of bytes, like_width"),
        ({"devices": []}, "at least 1 item"),
        ({"devices": phone(share=0.9)}, "shares add up to 0.9; wanted 1"),
        ({"devices": phone(share=0)}, "greater than 0"),
        ({"devices": phone(share=float("nan"))}, "finite number"),
        ({"devices": phone(bytes="1 stone")}, "'1 stone' is no size"),
        ({"devices": phone(bytes=0)}, "greater than or equal to 1"),
        ({"devices": phone(name="")}, "at least 1 character"),
        ({"devices": phone(colour="red")}, "Extra inputs are not permitted"),
        ({"devices": phone(share=0.5) * 2}, "devices: phone stands there twice; wanted distinct names"),
    ],
)
def test_bad_forms_are_refused(keys: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(wanted)):
        Budgets.model_validate(keys)


def test_recomputation_is_given_or_chosen() -> None:
    for keys in ({"levels": {"b*": 1}}, {"again": [["b1", "b2"]]}):
        with pytest.raises(ValidationError, match="auto chooses levels and again by itself; wanted neither beside it"):
            Local.model_validate({"recompute": "auto", **keys})


def test_counts_that_do_not_fit_the_clients_are_refused() -> None:
    with pytest.raises(ValueError, match="budgets: clients per budget add up to 3, data.partition.clients is 4"):
        Budgets.model_validate({"fraction": {1.0: 3}}).limits(4)
    few = [{**PHONES[0], "share": 0.01}, {**PHONES[1], "share": 0.99}]
    with pytest.raises(ValueError, match=r"budgets.devices: tablet: a share of 0.01 is none of 4 clients"):
        Budgets.model_validate({"devices": few}).limits(4)


# ------------------------------------------------------------------------------------------------- resolved, per client
def people(p: RunPaths) -> list[tuple[Any, ...]]:
    rows = io.read_table(p.assignment).to_pylist()
    return [tuple(r[k] for k in ("name", "group", "ratio", "budget", "plan")) for r in rows]


def test_every_client_is_given_bytes_a_ratio_and_a_name(mine: str, root: Path) -> None:
    p = assigned(make_run(f"{mine}:ratios", STUDY, budgets={"scenario": "surplus"}, budget="off"), root)
    rt = Runtime(make_run("fedavg", STUDY), dataset.load(p.data))
    names = {1 / 6: "width 1/6", 1 / 3: "width 1/3", 0.5: "width 0.5"}
    needs = widths_bytes(rt, [*names, 1.0])
    want = [(n, g, r, needs[r]) for g, (r, n) in enumerate(names.items())] + [("fraction 2", 3, 2.0, 2 * needs[1.0])]
    rows = people(p)
    assert [r[:4] for r in rows] == [want[4 * i // 6] for i in range(6)]
    steps = {r["plan"]: r["steps"] for r in io.read_table(p.plans).to_pylist()}
    assert [steps[r[4]] for r in rows] == [round(12 * r[2]) for r in rows], "a plan may read the ratio"


def test_devices_have_their_bytes_and_what_part_of_the_full_need_these_are(root: Path) -> None:
    devices = [{"name": "phone", "bytes": 50_000, "share": 0.5}, {"name": "tablet", "bytes": "1MiB", "share": 0.5}]
    p = assigned(make_run("fedepth", budgets={"devices": devices}), root)
    full = widths_bytes(Runtime(make_run("fedavg"), dataset.load(p.data)), [1.0])[1.0]
    rows = people(p)
    want = [("phone", 0, 50_000 / full, 50_000)] * 3 + [("tablet", 1, MIB / full, MIB)] * 3
    assert [r[:4] for r in rows] == want
    given = {r["client"]: (r["kind"], r["value"], r["name"]) for r in io.read_table(p.clients).to_pylist()}
    assert given == {i: ("bytes", r[3], r[0]) for i, r in enumerate(rows)}


@pytest.mark.parametrize("budgets", [{"fraction": {0.6: 3, 1: 3}}, {"like_width": {0.5: 3, 1: 3}}])
def test_measure_asks_for_the_plans_that_assign_gives(budgets: dict[str, Any], root: Path) -> None:
    p = assigned(make_run("fedepth", budgets=budgets), root)
    tried = {r["budget"] for r in io.read_table(p.tried).to_pylist()}
    rows = people(p)
    assert tried == {r[3] for r in rows if r[4]} and len({r[3] for r in rows}) == 2


# --------------------------------------------------------------------------------------------------- predicted as over
def test_what_is_over_is_said_of_each_phase() -> None:
    parts = {"p0": [Parts(activations=4 * MIB, gradients=MIB), Parts(parameters=3 * MIB)], "p1": [Parts(MIB)]}
    given = [(c, "p0", b * MIB) for c, b in enumerate((4, 4, 5, 6))] + [(4, "p1", MIB), (5, None, 1), (6, "p0", None)]
    found = plans_over(given, parts.__getitem__, 0.1)
    assert [(o.clients, o.phase, o.budgets) for o in found] == [
        ((0, 1, 2), 0, (4 * MIB, 5 * MIB)),
        ((4,), 0, (MIB,)),
    ]
    said = (
        "clients 0-2: predicted peak 5.00 MiB of phase 1 of 2 (activations 4.00 MiB, gradients 1.00 MiB) and 10% margin"
    )
    assert str(found[0]) == f"{said} are over their budgets of 4.00 MiB, 5.00 MiB"
    with pytest.raises(FedpipeError, match=f"^{re.escape(said)}.*1 more of the plans' phases are over.*; budget: warn"):
        judge_plans(found, "enforce", "stop")
    judge_plans([], "enforce", "stop")
    assert not plans_over([(0, "p1", MIB)], parts.__getitem__, 0.0)


LINE = r"clients 0-1: predicted peak 0\.\d+ MiB of phase 1 of 1 \(\w+ 0\.\d+ MiB, .*\) and 5% margin are over their"
SAID = re.compile(r"fedpipe: (client.*over (?:its|their) budget.*)")


class Ended:
    """A study run by the command: its status, and what it said of budgets."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], method: str, **keys: Any):
        self.out = folder / "out"
        (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, "methods": [method], **keys}))
        capsys.readouterr()
        self.status = main(["run", str(folder / "study.yaml"), "--out", str(self.out)])
        self.said = [line for line in capsys.readouterr().err.splitlines() if "budget" in line]

    def rows(self, name: str) -> list[dict[str, Any]]:
        files = sorted(self.out.glob(name))
        return [r for f in files for r in io.read_table(f).to_pylist()]

    @property
    def over(self) -> list[dict[str, Any]]:
        return [r for r in self.rows("runs/*/rounds/*.peaks.obs.parquet") if r["measured"] > r["budget"]]


def test_a_plan_over_its_budget_stops_the_study(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budgets = {"fraction": {1 / 1.1: 2, 1.0: 4}}
    ended = Ended(tmp_path, capsys, f"{mine}:careless", budgets=budgets)
    assert ended.status == 2 and len(ended.said) == 1
    wanted = rf"fedpipe: error: {LINE} budget of 0\.\d+ MiB; budget: warn goes on and marks the cells"
    assert re.fullmatch(wanted, ended.said[0])
    assert not list(ended.out.glob("runs/*/plans.parquet")) and not list(ended.out.glob("runs/*/rounds"))


def test_a_plan_over_its_budget_goes_on_and_is_marked(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = {"fraction": {1 / 1.1: 2, 1.0: 4}}
    ended = Ended(tmp_path, capsys, f"{mine}:careless", budgets=budgets, budget="warn")
    assert ended.status == 0 and len(ended.over) == 4, "two clients in two rounds"
    predicted, measured = ended.said
    assert re.fullmatch(rf"fedpipe: {LINE} budget of 0\.\d+ MiB; going on", predicted)
    assert re.match(
        r"fedpipe: client 0, round 0: measured peak 0\.\d+ MiB of phase 1 of 1 is over its budget", measured
    )
    (row,), (seen,) = ended.rows("table.parquet"), ended.rows("table.obs.parquet")
    assert (row["over_budget"], row["phases"]) == (2, 1)
    assert seen["peak_excess"] == max(r["measured"] / r["budget"] for r in ended.over) - 1
    md, tex, html = ((ended.out / n).read_text() for n in ("table.md", "table.tex", "report.html"))
    peak = f"{row['predicted_peak'] / MIB:.3f}"
    assert f"| {peak} † | 2 |" in md and "† over a client's budget" in md
    assert rf"{peak} $\dagger$ & 2" in tex
    assert f"<td>{peak} †</td><td>2</td><td>{seen['measured_peak'] / MIB:.3f} †</td>" in html
    assert f"<td>{100 * seen['peak_excess']:.1f}</td>" in html and "Time (s)" in html
    assert "What is over its budget goes on and is marked." in html


def test_a_plan_over_its_budget_is_dropped(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budgets = {"fraction": {1 / 1.1: 2, 1.0: 4}}
    ended = Ended(tmp_path, capsys, f"{mine}:careless", budgets=budgets, on_client_failure="drop")
    assert ended.status == 0 and not ended.over
    (line,) = ended.said
    assert re.fullmatch(rf"fedpipe: {LINE} budget of 0\.\d+ MiB; dropped", line)
    assigned = ended.rows("runs/*/assignment.parquet")
    assert [r["plan"] is None and r["needs"] > r["budget"] for r in assigned] == [True] * 2 + [False] * 4
    assert ended.rows("table.parquet")[0]["taking_part"] == 4


@pytest.mark.parametrize("word", ["off", '"off"', "warn", "enforce"])
def test_words_of_budget_are_those_of_yaml(word: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(f"name: s\nmethods: [fedavg]\nbudget: {word}\n")
    assert load_study(file).budget == word.strip('"')
    assert load_study(file, ["budget=off"]).budget == "off"


def test_budgets_that_are_off_limit_nothing(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = Ended(tmp_path, capsys, "fedavg", budgets={"fraction": {0.1: 2, 1.0: 4}}, budget="off")
    assert ended.status == 0 and not ended.said and len(ended.over) == 4
    (row,), (seen,) = ended.rows("table.parquet"), ended.rows("table.obs.parquet")
    assert (row["taking_part"], row["over_budget"], seen["peak_excess"]) == (6, None, None)
    assert seen["measured_peak"] > 0
    assert "†" not in (ended.out / "report.html").read_text()


# ---------------------------------------------------------------------------------------------------- measured as over
def test_a_client_that_measures_over_its_budget(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys: dict[str, Any] = {"budgets": {"fraction": {1.0: 6}}}
    stopped = Ended(tmp_path, capsys, f"{mine}:growing", **keys)
    said = r"client 2, round 1: {}measured peak 3\.\d+ MiB of phase 1 of 1 is over its budget of 0\.\d+ MiB "
    said += r"\(predicted 0\.\d+ MiB: \w+ 0\.\d+ MiB, \w+ .*\)"
    end = r"; raise margin, or budget: warn goes on"
    (line,) = stopped.said
    last = rf"{end}; on_client_failure: drop goes on without it"
    assert stopped.status == 2 and re.fullmatch(rf"fedpipe: error: {said.format('')}{last}", line)
    game = Game(make_run(f"{mine}:growing", STUDY, **keys, on_client_failure="drop"), stopped.out).play(2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "budget" in line]
    assert re.fullmatch(rf"fedpipe: {said.format('dropped, ')}{end}", line)
    assert [(m["round"], m["client"]) for s in game.sent for m in s.metrics if m["failed"]] == [(1, 2)]
    warned = Ended(tmp_path / "out", capsys, f"{mine}:growing", **keys, budget="warn")
    (line,) = warned.said
    assert warned.status == 0 and re.fullmatch(rf"fedpipe: {said.format('')}; going on", line)
    assert [(r["client"], r["round"]) for r in warned.over] == [(2, 1)]
    (row,), (seen,) = warned.rows("table.parquet"), warned.rows("table.obs.parquet")
    assert (row["failed_updates"], row["over_budget"]) == (0, 0) and seen["peak_excess"] > 1
    html = (warned.out / "report.html").read_text()
    assert f"<td>{seen['measured_peak'] / MIB:.2f} †</td><td>{100 * seen['peak_excess']:.1f}</td>" in html


def test_a_measured_excess_is_said_once_of_a_plan_and_phase(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    game = Game(make_run("fedavg", STUDY, budgets={"fraction": {1.0: 6}}, budget="warn"), root)
    inner = measure.Peak.__exit__

    def more(self: Any, *error: Any) -> None:
        inner(self, *error)
        self.bytes += MIB

    monkeypatch.setattr(measure.Peak, "__exit__", more)
    capsys.readouterr()
    game.play(2)
    peaks = game.opened.rounds.peaks
    assert len(peaks) == 12 and all(p["measured"] > p["budget"] for p in peaks)
    assert len(SAID.findall(capsys.readouterr().err)) == 1


# ---------------------------------------------------------------------------------------------------------------- CUDA
Calls = list[tuple[str, Any]]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """torch's functions of a device of 1 GiB, 600 MiB of it free and 100 MiB reserved, as a list of calls."""
    calls: Calls = []
    monkeypatch.setattr(measure, "_warm", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 90 * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 95 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 * MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600 * MIB, 1024 * MIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(("empty", None)))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: calls.append(("limit", share))
    )
    yield calls


def train_until_out_of_memory(budget: int | None, how: str) -> Witness:
    row = {"client": 3, "round": 1, "plan": "p0", "witness": True}
    witness = Witness(row, [Parts(MIB), Parts(activations=8 * MIB)], budget, torch.device("cuda"), how)
    with witness.phase(1, {"model/w": torch.zeros(MIB // 4)}):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 MiB")
    return witness


def test_the_allocator_refuses_what_is_beyond_the_budget(cuda: Calls) -> None:
    wanted = (
        "measured peak 6.00 MiB of phase 2 of 2, and more was asked for, is over its budget of 9.00 MiB (predicted 8.00"
    )
    with pytest.raises(FedpipeError, match=re.escape(wanted)) as e:
        train_until_out_of_memory(9 * MIB, "enforce")
    assert isinstance(e.value.__cause__, torch.OutOfMemoryError)
    allowed = 100 * MIB + 12 * MIB + SEGMENTS  # 8 MiB beyond what is held, half as much again
    assert cuda == [("empty", None), ("limit", allowed / (1024 * MIB)), ("limit", 1.0)]


@pytest.mark.parametrize(
    ("budget", "how"), [(9 * MIB, "warn"), (9 * MIB, "off"), (None, "enforce"), (2000 * MIB, "enforce")]
)
def test_the_allocator_is_left_alone(cuda: Calls, budget: int | None, how: str) -> None:
    """Where nothing is enforced, and where the device is smaller than the budget: it ran out, and not the client."""
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        train_until_out_of_memory(budget, how)
    assert "limit" not in dict(cuda)


@pytest.mark.gpu
def test_a_client_on_cuda_is_refused_memory_beyond_its_budget() -> None:
    device = torch.device("cuda")
    witness = Witness(
        {"client": 3, "round": 1, "plan": "p0", "witness": True}, [Parts(MIB)] * 2, 30 * MIB, device, "enforce"
    )
    with witness.phase(0, {}):
        torch.ones(26 * MIB // 4, device=device)
    assert witness.rows[0]["measured"] == 26 * MIB and not witness.over()
    wanted = "of phase 2 of 2, and more was asked for, is over its budget of 30.00 MiB"
    with pytest.raises(FedpipeError, match=wanted), witness.phase(1, {}):
        _ = [torch.ones(10 * MIB // 4, device=device) for _ in range(60)]
    assert len(witness.rows) == 1
    assert torch.ones(300 * MIB // 4, device=device).numel(), "the limit has been lifted"


# -------------------------------------------------------------------------------------------- the claim, on a whole run
@pytest.mark.slow
def test_every_client_keeps_its_budget_where_plans_go_by_bytes(root: Path) -> None:
    """FeDepth's fair scenario, every client measured: blocks by bytes and widths hold, the published blocks do not."""
    fair = {
        "name": "fair",
        "data": {"name": "digits", "rows": 800, "partition": {"kind": "iid", "clients": 12}},
        "model": "preresnet20",
        "rounds": 2,
        "cohort": 12,
        "local": {"batch": 32, "optimizer": {"lr": 0.05, "momentum": 0.9}},
        "budgets": {"scenario": "fair"},
        "measure": "all",
        "budget": "warn",
    }
    beyond = {}
    for method in ({"fedepth": {"blocks": "bytes"}}, {"heterofl": {"widths": [1.0, 0.5, 0.333, 0.166]}}):
        game = Game(make_run(method, fair), root).play()
        peaks = game.opened.rounds.peaks
        assert {p["client"] for p in peaks} == {r["client"] for r in game.trains} and len(peaks) >= len(game.trains)
        assert all(p["measured"] <= p["budget"] and p["measured"] <= 1.001 * p["predicted"] for p in peaks)
        beyond[next(iter(method))] = len({r["client"] for r in game.trains})
    assert beyond == {"fedepth": 9, "heterofl": 12}  # one group holds less than any block takes
    game = Game(make_run({"fedepth": {"blocks": "paper"}}, fair), root).play(1)
    over = [p for p in game.opened.rounds.peaks if p["measured"] > p["budget"]]
    assert {p["client"] for p in over} == set(range(9)) and max(p["measured"] / p["budget"] for p in over) > 1.8
