"""Costs of units: their sums against whole traces, and the plans that are made from them."""

import itertools
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpipe import io
from fedpipe.__main__ import main
from fedpipe.config import ModelSpec, Optimizer, Run
from fedpipe.data.dataset import Dataset
from fedpipe.errors import FedpipeError
from fedpipe.explain import spans
from fedpipe.memory import Parts
from fedpipe.memory.costs import Costs
from fedpipe.memory.margin import with_margin, without_margin
from fedpipe.memory.stretch import Again, Stretch, of, ranges
from fedpipe.memory.trial import tried
from fedpipe.methods import fedepth
from fedpipe.models.build import load
from fedpipe.models.chain import Chain
from fedpipe.models.preresnet import Block, Head, Stem
from fedpipe.runtime import Runtime
from fedpipe.seeding import seeded
from fedpipe.types import Phase, Plan, Row

MOMENTUM = {"name": "sgd", "momentum": 0.9}


def runtime(model: Any, method: Any = "fedavg", batch: int = 8, optimizer: Any = MOMENTUM, **local: Any) -> Runtime:
    """On 64 black images of 3x16x16."""
    keys = {"batch": batch, "optimizer": optimizer, **local}
    run = Run(method={"name": method} if isinstance(method, str) else method, seed=0, model=model, local=keys)
    data = Dataset(
        x=torch.zeros(64, 3, 16, 16, dtype=torch.uint8),
        y=torch.arange(64) % 10,
        test=np.zeros(64, dtype=bool),
        shape=(3, 16, 16),
        classes=10,
        names=tuple("abcdefghij"),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    return Runtime(run, data)


def phase_of(rt: Runtime, first: int, last: int, **words: Any) -> Phase:
    ctx = rt.plan_ctx(Row(budget=None, samples=8))
    (phase,) = fedepth.phases(ctx, [ctx.units[first - 1 : last]])
    return Phase(live=phase.live, upto=phase.upto, **words)


@pytest.mark.parametrize(
    ("model", "optimizer", "stretches"),
    [
        ("preresnet20", MOMENTUM, [(1, 1), (4, 4), (2, 5), (1, 9), (9, 9)]),
        ("preresnet20", {"name": "adamw"}, [(1, 3), (7, 9)]),
        ({"name": "vit_tiny", "depth": 3}, MOMENTUM, [(1, 1), (2, 3), (1, 3)]),
        ({"name": "vit_tiny", "depth": 3}, {"name": "adamw"}, [(1, 1), (2, 3), (1, 3)]),
        ("mobilenet", MOMENTUM, [(1, 2), (5, 8), (13, 13)]),
        ("cnn4", MOMENTUM, [(1, 1), (2, 3), (1, 3)]),
        ({"name": "preresnet20", "norm": "running"}, {"name": "sgd", "weight_decay": 0.01}, [(1, 9), (3, 5)]),
        ({"name": "mlp", "hidden": [8, 16, 32]}, {"name": "adamw"}, [(1, 1), (1, 2)]),
    ],
)
def test_sums_of_units_are_the_traces_of_the_whole(model: Any, optimizer: Any, stretches: list) -> None:
    large = {"batch": 64} if optimizer == {"name": "adamw"} else {}  # so that a step's largest moment is no update
    rt = runtime(model, optimizer=optimizer, **large)
    costs = rt.chooser.costs()
    seen = set()
    for first, last in stretches:
        names = rt.build().names[first : last + 1]
        for level in (*costs.levels, Again):
            words: dict[str, Any] = {"levels": tuple((n, level) for n in names) if level else ()}
            phase = phase_of(rt, first, last, **({"again": tuple((n, n) for n in names)} if level is Again else words))
            summed = Stretch(costs, 0 if first == 1 else first, last).peak(level)
            (traced,) = rt.predictor.peaks(Plan(phases=(phase,)))
            assert abs(summed / traced - 1) < 2e-4, (model, first, last, level, summed, traced)
            seen.add(summed)
    assert len(seen) > len(stretches) or model == {"name": "mlp", "hidden": [8, 16, 32]}  # levels tell


@pytest.mark.parametrize("again", [(("b1", "b3"),), (("b2", "b5"), ("b7", "b9")), (("b4", "b4"), ("b5", "b6"))])
def test_ranges_that_run_again_add_up(again: tuple) -> None:
    rt = runtime("preresnet20")
    costs, names = rt.chooser.costs(), rt.build().names
    starts = {names.index(a): names.index(b) for a, b in again}
    ways, u = [], 0
    while u < len(names) - 1:
        end = starts.get(u)
        ways.append(costs.way(u, 0, u > 0) if end is None else costs.again(u, end, u > 0))
        u = u + 1 if end is None else end + 1
    (traced,) = rt.predictor.peaks(Plan(phases=(Phase(again=again),)))
    assert abs(costs.peak(ways) / traced - 1) < 1e-5


@pytest.mark.parametrize("optimizer", [MOMENTUM, {"name": "adamw"}])
@pytest.mark.parametrize(
    ("live", "upto"),
    [(("b3.*", "head.*"), None), (("stem.*", "b4.*"), None), (("*.norm*",), None), (("b[25].*",), "b6")],
)
def test_units_that_are_frozen_add_up(live: tuple, upto: str | None, optimizer: Any) -> None:
    rt = runtime("preresnet20", optimizer=optimizer)
    phase = Phase(live=tuple(f"model/{n}" for n in live), upto=upto)
    (traced,) = rt.predictor.peaks(Plan(phases=(phase,)))
    stretch = of(rt.chooser.costs(None, phase.live), phase)
    assert stretch is not None and abs(stretch.peak() / traced - 1) < 1e-5


ODD = """
from torch import nn


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


def net(shape, classes):
    head = nn.Sequential(nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(6 * 12 * 12, classes))
    return [("stem", nn.Conv2d(shape[0], 6, 3)), ("a", Odd()), ("b", Odd()), ("head", head)]
"""


def test_steps_that_cannot_be_captured_have_costs_too(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(ODD)
    rt = runtime({"name": f"{tmp_path / 'net.py'}:net"})
    costs = rt.chooser.costs()
    assert not costs.captured
    for level, again in ((0, ()), (Again, (("a", "a"), ("b", "b")))):
        (traced,) = rt.predictor.peaks(Plan(phases=(Phase(again=again),)))
        assert abs(Stretch(costs, 0, 2).peak(level) / traced - 1) < 1e-3


def test_units_that_are_built_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpipe.memory import played

    calls = []
    real = played.trained
    monkeypatch.setattr(played, "trained", lambda *a, **k: calls.append(1) or real(*a, **k))
    costs = runtime("preresnet20").chooser.costs()
    found = [costs.way(u, 0, False) for u in (2, 3, 5, 8)]
    assert found[0].saved == found[1].saved > found[2].saved > found[3].saved
    assert len(calls) == 3  # b2 and b3, b5, b8


def narrow(c1: int, c2: int, c3: int) -> Chain:
    """PreResNet-20 of these channels."""
    inward, out = [c1] * 4 + [c2] * 3 + [c3] * 2, [c1] * 3 + [c2] * 3 + [c3] * 3
    blocks = [
        Block(i, o, 2 if k in (4, 7) else 1, "batch", 1.0) for k, (i, o) in enumerate(zip(inward, out, strict=True), 1)
    ]
    named = [(f"b{k}", b) for k, b in enumerate(blocks, 1)]
    return Chain([("stem", Stem(3, c1, "batch", 1.0)), *named, ("head", Head(c3, 10, "batch", 1.0))], (3, 32, 32))


def saved(costs: Costs, first: int, last: int) -> float:
    """MiB kept between forward and backward of units first .. last, the head, and the stem with the first."""
    lowest = 0 if first == 1 else first
    total, kept = (costs.images if first == 1 else 0), False
    for way in [*(costs.way(u, 0, u > lowest) for u in range(lowest, last + 1)), costs.tail(last)]:
        total += way.saved + (costs.boundary[way.first] if way.input or kept else 0)
        kept = way.output
    return total / 2**20


def test_activations_of_fedepths_network_are_those_counted_by_autograd() -> None:
    """Saved tensors of an independent PreResNet-20, batch 128 of 32x32, in torch 2.13: whole, narrower, in blocks."""
    costs = Costs(narrow(16, 32, 64), 128, Optimizer())
    whole = saved(costs, 1, 9)
    assert whole == pytest.approx(193.5, abs=0.1)
    for part, share, size in ((2, 50.4, 97.5), (3, 32.0, 61.9), (6, 14.3, 27.8), (8, 13.2, 25.5)):
        slim = saved(Costs(narrow(16 // part, 32 // part, 64 // part), 128, Optimizer()), 1, 9)
        assert (slim, 100 * slim / whole) == (pytest.approx(size, abs=0.1), pytest.approx(share, abs=0.1))
    alone = [saved(costs, k, k) for k in range(1, 10)]
    assert alone == pytest.approx([45.5, 36.0, 36.0, 28.0, 20.0, 20.0, 16.0, 12.0, 12.0], abs=0.1)
    published = {
        24: {(1, 1): 45.5, (2, 2): 36, (3, 3): 36, (4, 4): 28, (5, 6): 36, (7, 9): 32},
        40: {(1, 2): 77.5, (3, 4): 60, (5, 9): 64},
        57: {(1, 3): 109.5, (4, 9): 88},
    }
    for largest, blocks in published.items():
        found = {block: saved(costs, *block) for block in blocks}
        assert found == pytest.approx(blocks, abs=0.1)
        assert 100 * max(found.values()) / whole == pytest.approx(largest, abs=1)
    lack = [saved(costs, *block) for block in ((4, 4), (5, 5), (6, 6), (7, 8), (9, 9))]
    assert lack == pytest.approx([28, 20, 20, 24, 12], abs=0.1)
    assert 100 * max(lack) / whole == pytest.approx(14, abs=1)


def deep_chain(blocks: int, side: int = 32) -> Chain:
    units: list[tuple[str, nn.Module]] = [("stem", Stem(3, 16, "batch", 1.0))]
    inward = 16
    for k in range(1, blocks + 1):
        out = 16 << (3 * (k - 1) // blocks)
        units.append((f"b{k}", Block(inward, out, 2 if out != inward else 1, "batch", 1.0)))
        inward = out
    return Chain([*units, ("head", Head(inward, 10, "batch", 1.0))], (3, side, side))


@pytest.mark.slow
def test_all_ranges_of_64_blocks_take_less_than_a_minute() -> None:
    chain = deep_chain(64)
    began = time.process_time()
    costs = Costs(chain, 32, Optimizer(momentum=0.9))
    found = ranges(costs, (*costs.levels, Again))
    spent = time.process_time() - began
    assert len(found) == 2080 and all(len(levels) == 3 for levels in found.values())
    assert spent < 60, spent
    began = time.process_time()
    assert Stretch(costs, 0, 64).cheapest(found["b1", "b64"][0] // 3) is not None  # of 2,080 ranges
    assert time.process_time() - began < 1


@pytest.mark.slow
def test_a_plan_of_64_blocks_is_predicted_in_seconds(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text("from test_costs import deep_chain\n\n\ndef net(shape, classes):\n    return deep_chain(64, 16)\n")
    rt = runtime({"name": f"{file}:net"}, batch=32)
    assert rt.state0
    spent = []
    for levels in ((), (("b*", 1),), (("b1", 1),)):
        began = time.process_time()
        assert rt.predictor.peaks(Plan(phases=(Phase(levels=levels),)))[0] > 2**20
        spent.append(time.process_time() - began)
    assert sorted(spent)[1] < 4, spent  # a step is captured each time


@pytest.mark.parametrize("model", ["preresnet20", {"name": "vit_tiny", "depth": 3}])
def test_a_phase_runs_as_little_again_as_its_budget_takes(model: Any) -> None:
    rt = runtime(model, batch=64, recompute="auto")
    (whole,) = rt.predictor.peaks(Plan())
    stretch = of(rt.chooser.costs(), Phase())
    assert stretch is not None
    least = stretch.smallest()
    assert least < 0.8 * whole
    works = []
    for limit in (whole, (whole + least) // 2, least + 64):  # sums are exact but for labels and scalars
        plan = rt.chooser.fitted(Plan(), limit)
        assert isinstance(plan, Plan)
        assert max(rt.predictor.peaks(plan)) <= limit
        chosen = stretch.cheapest(limit)
        assert chosen is not None
        works.append(len(plan.phases[0].levels) + len(plan.phases[0].again))
    assert works[0] == 0 < works[1]
    needs = rt.chooser.fitted(Plan(), least - 1)
    assert isinstance(needs, int) and needs >= least


def test_what_a_method_holds_leaves_less_room() -> None:
    """SCAFFOLD keeps three models beside the one it trains, which the units' costs know nothing of."""
    rt = runtime("preresnet20", method="scaffold", batch=64, recompute="auto")
    plan = rt.method.plan(rt.plan_ctx(Row(budget=None, samples=8)))  # type: ignore[misc]
    assert plan is not None
    (whole,) = rt.predictor.peaks(plan)
    plain = of(rt.chooser.costs(plan), plan.phases[0])
    assert plain is not None and whole > plain.peak()
    fitted = rt.chooser.fitted(plan, int(0.8 * whole))
    assert isinstance(fitted, Plan) and fitted.phases[0] != plan.phases[0]
    assert max(rt.predictor.peaks(fitted)) <= 0.8 * whole
    given = runtime("preresnet20", method="scaffold", batch=64)
    assert given.chooser.fitted(plan, int(0.8 * whole)) == whole


@pytest.mark.parametrize("recompute", ["given", "auto"])
@pytest.mark.parametrize("model", ["preresnet20", "cnn4", {"name": "mlp", "hidden": [16, 24, 32, 64]}])
def test_fedepths_blocks_cover_the_chain_fit_and_are_fewest(model: Any, recompute: str) -> None:
    rt = runtime(model, method="fedepth", recompute=recompute)
    (whole,) = rt.predictor.peaks(Plan())
    count = len(rt.build().names) - 2
    alone = max(rt.predictor.peaks(Plan(phases=tuple(phase_of(rt, k, k) for k in range(1, count + 1)))))
    counts = []
    for share in (1.1, 0.5, 0.2, 0.0, -0.5):
        budget = with_margin(int(alone + share * (whole - alone)), 0.05)
        ctx = rt.plan_ctx(Row(budget=budget, samples=8))
        plan = rt.method.plan(ctx)  # type: ignore[misc]
        if plan is None:
            assert share < 0 and ctx.refused and ctx.refused[-1] > budget
            continue
        blocks = [[u for u in ctx.units if any(p == f"model/{u}.*" for p in phase.live)] for phase in plan.phases]
        assert [u for block in blocks for u in block] == list(ctx.units)
        assert with_margin(max(rt.predictor.peaks(plan)), 0.05) <= budget
        counts.append(len(blocks))
        if share > 0 or recompute == "given":
            assert len(blocks) == brute_force(rt, without_margin(budget, 0.05))
    assert counts[0] == 1 and len(counts) > 1
    assert counts == sorted(counts)


def brute_force(rt: Runtime, limit: int) -> int:
    """Fewest blocks, by whole traces of all of them, recomputed as the study has it."""
    count = len(rt.build().names) - 2
    pairs = [(a, b) for a in range(1, count + 1) for b in range(a, count + 1)]
    fits = {p: isinstance(rt.chooser.fitted(Plan(phases=(phase_of(rt, *p),)), limit), Plan) for p in pairs}
    for cuts in range(count):
        for inner in itertools.combinations(range(1, count), cuts):
            edges = [0, *inner, count]
            if all(fits[a + 1, b] for a, b in itertools.pairwise(edges)):
                return cuts + 1
    raise AssertionError("nothing fits")


def test_the_first_plan_that_fits_is_the_deepest() -> None:
    rt = runtime("preresnet20", batch=32)
    ctx = rt.plan_ctx(Row(budget=None, samples=8))
    asked = []

    def prefix(n: int) -> Plan:
        asked.append(n)
        live = ctx.tensors(ctx.stem, *ctx.units[:n], ctx.head)
        return Plan(phases=(Phase(live=live, upto=None if n == 9 else ctx.units[n - 1]),))

    peaks = [rt.predictor.peaks(prefix(n))[0] for n in range(1, 10)]
    assert peaks == sorted(peaks)
    for n in (9, 5, 1):
        asked.clear()
        limited = rt.plan_ctx(Row(budget=with_margin(peaks[n - 1], 0.05), samples=8))
        assert limited.first(map(prefix, range(9, 0, -1))) == prefix(n)
        assert asked == [*range(9, n - 1, -1), n]
    poor = rt.plan_ctx(Row(budget=peaks[0], samples=8))
    assert poor.first(map(prefix, range(9, 0, -1))) is None and poor.refused[-1] == with_margin(peaks[0], 0.05)


def test_fedepths_published_blocks_go_by_ratio_not_by_bytes() -> None:
    rt = runtime("preresnet20", method={"name": "fedepth", "settings": {"blocks": "paper"}})
    plan = rt.method.plan
    assert plan is not None
    for ratio, sizes in ((1 / 6, [1, 1, 1, 1, 2, 3]), (1 / 3, [2, 2, 5]), (1 / 2, [3, 6]), (1.0, [9])):
        made = plan(rt.plan_ctx(Row(budget=1, samples=8, ratio=ratio)))
        assert made is not None
        assert [len([p for p in phase.live if p.startswith("model/b")]) for phase in made.phases] == sizes
    assert plan(rt.plan_ctx(Row(budget=1, samples=8, ratio=1 / 8))) is None  # b1 to b3 fit in no block
    with pytest.raises(FedpipeError, match="fedepth.blocks: 'both'; wanted bytes or paper"):
        runtime("preresnet20", method={"name": "fedepth", "settings": {"blocks": "both"}})


@pytest.mark.parametrize("margin", [0.0, 0.02, 0.05, 0.5])
def test_a_margin_taken_off_is_the_one_put_on(margin: float) -> None:
    for budget in (1, 7, 1000, 123_456_789):
        peak = without_margin(budget, margin)
        assert with_margin(peak, margin) <= budget < with_margin(peak + 1, margin)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_a_peak_is_made_of_its_parts(method: str, optimizer: str) -> None:
    rt = runtime(
        {"name": "mlp", "hidden": [256, 64]},
        method,
        optimizer={"name": optimizer, "momentum": 0.9 if optimizer == "sgd" else 0},
    )
    plan = rt.method.plan(rt.plan_ctx(Row(budget=None, samples=8))) if rt.method.plan else Plan()
    assert plan is not None
    (parts,) = rt.predictor.parts(plan)
    model = sum(p.nbytes for p in rt.build().parameters())
    assert parts.parameters == model
    assert parts.gradients == (0 if (method, optimizer) == ("fedavg", "sgd") else model)  # plain SGD moves as it goes
    assert model * (1 if optimizer == "sgd" else 2) <= parts.optimizer <= model * (1 if optimizer == "sgd" else 2) + 64
    assert parts.state == (3 * model if method == "scaffold" else 0)
    assert sum(astuple(parts)) == parts.peak == rt.predictor.peaks(plan)[0]


def test_activations_are_what_recomputation_saves() -> None:
    rt = runtime("preresnet20", batch=64)
    plain, less = (rt.predictor.parts(Plan(phases=(Phase(levels=levels),)))[0] for levels in ((), (("b*", 1),)))
    assert less.activations < 0.6 * plain.activations
    assert (less.parameters, less.optimizer) == (plain.parameters, plain.optimizer)
    assert plain.activations > 0.7 * plain.peak
    assert "activations" in plain.largest.split(",")[0] and len(plain.largest.split(",")) == 3


def test_what_no_gradient_reaches_has_no_state() -> None:
    """Units behind `upto` are live here, and never run: their optimizer keeps nothing for them."""
    rt = runtime("preresnet20", optimizer={"name": "adamw"})
    plan = Plan(phases=(Phase(upto="b2"),))
    (parts,) = rt.predictor.parts(plan)
    assert parts.optimizer < parts.parameters / 10
    (measured,) = tried(rt, plan, torch.arange(8))
    assert parts.peak == pytest.approx(measured.bytes, rel=0.002)


class Repeated(nn.Module):
    """Keeps `count` copies of its input for the backward."""

    def __init__(self, count: int, sizes: Any = None) -> None:
        super().__init__()
        self._count, self.sizes = count, sizes
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self._count):
            x = torch.tanh(x * self.scale)
        return x


def test_units_that_differ_in_private_settings_are_not_alike() -> None:
    units = [("stem", nn.Flatten()), ("a", Repeated(1, ([1], 2))), ("b", Repeated(20)), ("c", nn.Linear(768, 768))]
    costs = Costs(Chain([*units, ("head", nn.Linear(768, 768))], (3, 16, 16)), 8, Optimizer())
    assert costs.way(2, 0, True).saved > 5 * costs.way(1, 0, True).saved
    # a unit built like the head is not the head
    fixed = Costs(costs.chain, 8, Optimizer(), ("model/a.*",))
    assert fixed.still[3].rise > 0 and fixed.tail(3).gradients == 0 and fixed.way(3, 0, True).gradients == 0


@pytest.mark.parametrize("recompute", ["given", "auto"])
def test_units_that_cannot_be_linked_end_no_block(recompute: str) -> None:
    rt = runtime({"name": "mlp", "hidden": [64, 32, 16]}, method="fedepth", recompute=recompute)
    (whole,) = rt.predictor.peaks(Plan())
    rich = fedepth.method.plan(rt.plan_ctx(Row(budget=with_margin(whole, 0.05), samples=8)))  # type: ignore[misc]
    assert rich is not None and len(rich.phases) == 1
    poor = rt.plan_ctx(Row(budget=whole // 3, samples=8))
    assert fedepth.method.plan(poor) is None and poor.refused[-1] > whole // 3  # type: ignore[misc]


def test_blocks_of_a_narrow_model_go_by_its_own_costs() -> None:
    rt = runtime("preresnet20")
    ctx = rt.plan_ctx(Row(budget=None, samples=8))
    model, index = (("width", 0.25),), ctx.windows(width=0.25)

    def build(blocks: Any) -> Plan:
        return Plan(phases=fedepth.phases(ctx, blocks), model=model, index=index)

    (needs,) = rt.predictor.peaks(build([ctx.units]))
    limited = rt.plan_ctx(Row(budget=with_margin(needs, 0.05) + 64, samples=8))
    plan = limited.fewest(build)
    assert plan is not None and len(plan.phases) == 1 and plan.model == model


def test_words_in_a_row_are_shortened() -> None:
    assert spans(["stem", "b1", "b2", "b3", "b5", "head"]) == "stem b1-b3 b5 head"
    assert spans(["b9", "b10"]) == "b9-b10" and spans([]) == ""


def test_explain_shows_plans_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "s.yaml"
    study.write_text(
        "name: s\ndata: {name: digits, rows: 240, partition: {kind: iid, clients: 4}}\n"
        "model: {name: mlp, hidden: [32, 48, 64]}\nmethods: [fedavg, fedepth]\nrounds: 2\ncohort: 2\n"
        "local: {batch: 16}\nbudgets: {bytes: {100KiB: 2, 2MiB: 2}}\n"
    )
    out = tmp_path / "out"
    assert main(["explain", str(study), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "fedavg: the predicted peak" in said and "left out: needs" in said
    assert "Activations" in said and "Of budget" in said
    assert sorted(f.suffix for f in (out / "explain").glob("plans_*")) == [".png", ".png", ".svg", ".svg"]
    assert not list(out.glob("**/rounds/*")) and not list(out.glob("**/state/000002")) and not (out / "runs").exists()
    plans = [io.read_table(p) for p in sorted(out.glob("explain/runs/*/plans.parquet"))]
    assert len(plans) == 2
    for row in (r for t in plans for r in t.to_pylist()):
        assert (
            row["predicted"]
            == Parts(
                **{
                    k: row[k]
                    for k in (
                        "parameters",
                        "state",
                        "gradients",
                        "optimizer",
                        "activations",
                        "temporaries",
                        "workspace",
                    )
                }
            ).peak
        )


def test_a_models_own_file_has_costs_too(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n\n\ndef net(shape, classes):\n"
        "    return [('stem', nn.Conv2d(shape[0], 6, 3)), ('mid', nn.Sequential(nn.ReLU(), nn.Dropout(0.1))),\n"
        "            ('head', nn.Sequential(nn.Flatten(), nn.Linear(6 * 14 * 14, classes)))]\n"
    )
    with seeded(0):
        chain = load(ModelSpec(name=f"{file}:net"), (3, 16, 16), 10)
    costs = Costs(chain, 8, Optimizer(momentum=0.9))
    assert costs.steady == frozenset({1}) and costs.levels == [0]  # masks of dropout are given
    rt = runtime({"name": f"{file}:net"})
    assert abs(Stretch(costs, 0, 1).peak() / rt.predictor.peaks(Plan())[0] - 1) < 2e-4
