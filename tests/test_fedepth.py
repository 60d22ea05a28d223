"""FeDepth and m-FeDepth in all scenarios, against straight-line re-statements of the paper and its published code."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import Game, make_run
from oracles import fedepth
from played import CLOSE, Played, apart, local, play
from test_lean import runtime
from torch import Tensor

from fedpipe import io
from fedpipe.errors import FedpipeError
from fedpipe.memory.margin import with_margin
from fedpipe.memory.trial import tried
from fedpipe.methods import fedepth as fedepth_method
from fedpipe.plans import read_plans
from fedpipe.runtime import Runtime
from fedpipe.types import Plan, Row, Tensors, matches

NAMES = fedepth.names()
BUDGETS = ("10.5MiB", "12MiB", "15MiB", "20MiB")  # at batch 64 on 8x8 pixels in float64
DEPTH = {"model": "preresnet20", "methods": ["fedepth"], "rounds": 2}
DIGITS = {"name": "digits", "rows": 240, "size": 8}


@pytest.fixture(scope="module")
def four(root: Path) -> Played:
    """Four clients, one per budget, all taking part."""
    data = {**DIGITS, "partition": {"kind": "dirichlet", "alpha": 0.1, "clients": 4, "min_samples": 8}}
    budgets = {"bytes": dict.fromkeys(BUDGETS, 1)}
    how = {**local(1, batch=64), "schedule": "cosine"}
    return play(root, data=data, cohort=4, local=how, budgets=budgets, **DEPTH)


def blocks_of(got: Played, client: int) -> list[list[int]]:
    """Layer numbers of each of a client's blocks, from its plan's file."""
    (plan,) = {r["plan"] for r in io.read_table(got.paths.assignment).to_pylist() if r["client"] == client}
    phases = [r for r in io.read_table(got.paths.plans).to_pylist() if r["plan"] == plan]
    out = []
    for row in sorted(phases, key=lambda r: r["phase"]):
        assert ("stem" in row["trains"]) == (row["phase"] == 0) and row["trains"][-1] == "head"
        out.append([int(u[1:]) for u in row["trains"] if u not in ("stem", "head")])
    assert [k for block in out for k in block] == list(range(1, 10)), "blocks cut the chain in depth order"
    return out


def as_net(state: Tensors) -> dict[str, Tensor]:
    return {own: state[name] for own, name in NAMES.items()}


def restated(got: Played, lrs: Sequence[float], batches: Callable[[int, int, int], list[tuple[Tensor, Tensor]]],
             clients: Sequence[int], carry: bool = True) -> dict[str, Tensor]:  # fmt: skip
    """The server's model after two rounds by the oracle."""
    blocks = {i: blocks_of(got, i) for i in clients}
    w, net = as_net(got.state(0)), fedepth.Net(got.data.shape[0], got.data.classes)
    for t in range(2):
        uploads = [
            fedepth.client(w, net, blocks[i], lambda j, t=t, i=i: batches(t, i, j), lrs[t], 0.9, 5e-4, carry)
            for i in clients
        ]
        w = fedepth.mean(uploads, got.samples(clients))
    return w


def agree(w: dict[str, Tensor], got: Played) -> None:
    start, end = as_net(got.state(0)), as_net(got.state(2))
    # block 1's norm undoes the scale and shift of the stem's, which only decay moves
    assert all(float((end[n] - start[n]).abs().max()) > 1e-4 for n in w if not n.startswith("first norm"))
    worst = {n: float((w[n] - end[n]).abs().max()) for n in w}
    assert max(worst.values()) <= CLOSE, max(worst, key=worst.__getitem__)


def test_fedepth_budgets_give_four_plans(four: Played) -> None:
    blocks = [blocks_of(four, i) for i in range(4)]
    assert len({str(b) for b in blocks}) == 4
    assert len(blocks[0]) >= 3 and len(blocks[3]) == 1


@pytest.mark.parametrize("group", range(4))
def test_fedepth_of_one_client_with_a_full_batch(root: Path, four: Played, group: int) -> None:
    """Rows are taken in the file's order: in a full batch the engine's own order does not matter."""
    data = {**DIGITS, "rows": 16, "partition": {"kind": "iid", "clients": 1}}
    got = play(root, data=data, cohort=1, local=local(2, batch=64), budgets={"bytes": {BUDGETS[group]: 1}},
               prediction=four.paths.prediction, **DEPTH)  # fmt: skip
    assert blocks_of(got, 0) == blocks_of(four, group)
    assert len(got.rows[0]) <= 64
    rows = got.batch(got.rows[0])
    w = restated(got, [0.05, 0.05], lambda t, i, j: [rows, rows], [0])
    agree(w, got)
    if group == 0:
        fresh_head = restated(got, [0.05, 0.05], lambda t, i, j: [rows, rows], [0], carry=False)
        assert apart(list(w.values()), list(fresh_head.values())) > 1e-3, "the head's momentum must be seen to go on"


def test_fedepth_of_four_groups(four: Played) -> None:
    samples = four.samples(range(4))
    assert min(samples) < 64 < max(samples) and max(samples) % 64, "batches of one, several, and a shorter last one"
    agree(restated(four, [0.05, 0.025], lambda t, i, j: four.batches(t, i, j), range(4)), four)


def test_fedepth_freezes_what_a_phase_does_not_train(four: Played) -> None:
    """The loop stopped after each phase: units outside the next phase are the same bits after it."""
    rt = Runtime(four.run, four.data)
    plan = read_plans(io.read_table(four.paths.plans))[0]["p0"]
    ends = []
    for count in range(1, len(plan.phases) + 1):
        part = replace(plan, phases=plan.phases[:count])
        person = rt.client(rt.ctx(0, 0), rt.received(part, rt.state0), four.rows[0])
        ends.append(rt.loop().train([person], part)[0].sent)
    assert len(ends) == 4
    for before, after, phase in zip([rt.state0, *ends], ends, plan.phases, strict=False):
        live = {n for n in after if matches(n, phase.live)}
        assert all(torch.equal(before[n], after[n]) == (n not in live) for n in after)


# ------------------------------------------------------------------------------- scenarios, by the published blocks
PUBLISHED = {
    1 / 8: [[4], [5], [6], [7, 8], [9]],
    1 / 6: [[1], [2], [3], [4], [5, 6], [7, 8, 9]],
    1 / 3: [[1, 2], [3, 4], [5, 6, 7, 8, 9]],
    1 / 2: [[1, 2, 3], [4, 5, 6, 7, 8, 9]],
    1: [[1, 2, 3, 4, 5, 6, 7, 8, 9]],
}
GROUPS = {"fair": (1 / 6, 1 / 3, 1 / 2, 1), "lack": (1 / 8, 1 / 6, 1 / 2, 1), "surplus": (1 / 6, 1 / 3, 1 / 2, 1)}


def scenario(root: Path, name: str, method: str, epochs: int, batch: int, **settings: Any) -> Played:
    """Four clients, one of each group, in two rounds; blocks go by activation counts, whatever they take in bytes."""
    data = {**DIGITS, "partition": {"kind": "dirichlet", "alpha": 0.3, "clients": 4, "min_samples": 20}}
    methods = [{method: {"blocks": "paper", "scenario": name, **settings}}]
    how = {"data": data, "cohort": 4, "local": local(epochs, batch=batch), "methods": methods}
    return play(root, **{**DEPTH, **how, "budgets": {"scenario": name}, "budget": "warn"})


def told(got: Played, name: str, faithful: bool = False, heads: bool = False) -> tuple[dict[str, Tensor], Tensors]:
    """The server's model after two rounds by the oracle, and the peer of the last client."""
    names = fedepth.names(heads)
    w = {own: got.state(0)[n] for own, n in names.items()}
    shape = got.data.shape[0], got.data.classes
    nets = fedepth.Net(*shape, heads=heads), fedepth.Net(*shape, heads=heads)
    peer, samples = w, got.samples(range(4))
    for t in range(2):
        uploads, trained = [], []
        for i, ratio in enumerate(GROUPS[name]):
            blocks = PUBLISHED[ratio]
            trained.append({n for j in range(len(blocks)) for n in fedepth.trained_in(nets[0], blocks, j)})
            if name == "surplus" and i == 3:
                up, peer = fedepth.mutual(w, peer, nets, got.batches(t, i, 0), 0.05, 0.9, 5e-4)
            else:
                up = fedepth.client(w, nets[0], blocks, lambda j, t=t, i=i: got.batches(t, i, j), 0.05, 0.9, 5e-4,
                                    faithful=faithful)  # fmt: skip
            uploads.append(up)
        if heads and faithful:
            w = fedepth.mean_by_published_weights(uploads, samples, [PUBLISHED[r] for r in GROUPS[name]])
        else:
            w = fedepth.mean_by_head(w, uploads, samples, trained) if heads else fedepth.mean(uploads, samples)
    return w, {names[n]: t for n, t in peer.items()}


def same(got: Played, w: dict[str, Tensor], heads: bool = False) -> None:
    start, end = got.state(0), got.state(2)
    names = fedepth.names(heads)
    assert set(names.values()) == set(end)
    worst = {n: float((w[own] - end[n]).abs().max()) for own, n in names.items()}
    assert max(worst.values()) <= CLOSE, max(worst, key=worst.__getitem__)
    assert max(float((end[n] - start[n]).abs().max()) for n in end) > 1e-2


@pytest.mark.parametrize(("epochs", "batch"), [(1, 128), (2, 16)])
@pytest.mark.parametrize("name", ["fair", "lack", "surplus"])
def test_every_scenario(name: str, epochs: int, batch: int, root: Path) -> None:
    got = scenario(root, name, "fedepth", epochs, batch)
    steps = [len(got.batches(0, i, 0)) for i in range(4)]
    assert (steps == [1] * 4) if batch == 128 else min(steps) > 2
    w, peer = told(got, name)
    same(got, w)
    owns = sorted((got.paths.own(2)).glob("*.safetensors"))
    assert len(owns) == (name == "surplus")
    if owns:
        mine = {n.removeprefix("own/peer/"): t for n, t in io.read_tensors(owns[0])[0].items()}
        assert max(float((mine[n] - t).abs().max()) for n, t in peer.items()) <= CLOSE
        assert apart([mine[n] for n in peer], [got.state(2)[n] for n in peer]) > 1e-3


@pytest.mark.parametrize(("epochs", "batch"), [(2, 128), (1, 32)])
@pytest.mark.parametrize("name", ["fair", "lack"])
def test_frozen_tensors_move_by_momentum_where_the_published_code_moves_them(
    name: str, epochs: int, batch: int, root: Path
) -> None:
    got = scenario(root, name, "fedepth", epochs, batch, faithful=True)
    w, _ = told(got, name, faithful=True)
    same(got, w)
    assert apart([*w.values()], [*told(got, name)[0].values()]) > 1e-3


@pytest.mark.parametrize(("epochs", "batch"), [(1, 128), (1, 32), (2, 32)])
@pytest.mark.parametrize("name", ["fair", "lack"])
def test_a_head_behind_every_block(name: str, epochs: int, batch: int, root: Path) -> None:
    got = scenario(root, name, "fedepth_mhead", epochs, batch)
    w, _ = told(got, name, heads=True)
    same(got, w, heads=True)
    start, end = got.state(0), got.state(2)
    moved = {n.split(".")[0] for n in end if n.startswith("exit_") and not torch.equal(start[n], end[n])}
    ends = {b[-1] for ratio in GROUPS[name] for b in PUBLISHED[ratio]}
    assert moved == {f"exit_b{k}" for k in ends - {9}}, "a head that nobody trains stays as it is"


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("name", ["fair", "lack"])
def test_heads_weigh_and_the_last_of_six_blocks_stays_frozen_as_published(name: str, epochs: int, root: Path) -> None:
    got = scenario(root, name, "fedepth_mhead", epochs, 32, faithful=True)
    assert max(len(got.batches(0, i, 0)) for i in range(4)) > epochs, "several batches"
    w, _ = told(got, name, faithful=True, heads=True)
    same(got, w, heads=True)
    plain, _ = told(got, name, heads=True)
    far = {n: float((w[n] - plain[n]).abs().max()) for n in w}
    for units in ("123456", "789"):
        assert max(d for n, d in far.items() if n[0] in units and "th " not in n) > 1e-3, "frozen blocks moved"
    ends = {b[-1] for ratio in GROUPS[name] for b in PUBLISHED[ratio]}
    end, heads = got.state(2), {k: f"exit_b{k}." for k in range(1, 9)}
    zero = {k for k, head in heads.items() if all(not t.any() for n, t in end.items() if n.startswith(head))}
    assert zero == {1, 2, 3, 4, 5} - ends == ({5} if name == "fair" else set()), "heads that weigh and nobody trained"
    assert all(far[f"{k}th linear"] > 1e-3 for k in (1, 2, 3, 4, 5))
    phases = [r for r in io.read_table(got.paths.plans).to_pylist() if r["phase"] == 5]
    assert [(r["upto"], r["trains"]) for r in phases] == [(None, ["b5", "b6", "head"])]


def test_each_published_quirk_of_heads_moves_the_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The re-statement with either of them left out is far away: both are seen to be there."""
    got = scenario(root, "fair", "fedepth_mhead", 1, 32, faithful=True)
    w, _ = told(got, "fair", faithful=True, heads=True)
    with monkeypatch.context() as m:
        m.setattr(fedepth, "in_published_phase", fedepth.trained_in)
        trained, _ = told(got, "fair", faithful=True, heads=True)
    with monkeypatch.context() as m:
        m.setattr(fedepth, "mean_by_published_weights", lambda uploads, samples, blocks: fedepth.mean(uploads, samples))
        plain, _ = told(got, "fair", faithful=True, heads=True)
    assert min(apart([w[f"{k} conv b"]], [trained[f"{k} conv b"]]) for k in (5, 6, 7, 8, 9)) > 1e-3
    assert min(apart([w[f"{k}th linear"]], [plain[f"{k}th linear"]]) for k in (1, 2, 3, 4, 5)) > 1e-3


def test_a_client_that_lacks_memory_sends_what_it_left_out_as_it_came(root: Path) -> None:
    got = scenario(root, "lack", "fedepth", 1, 32)
    rt = Runtime(got.run, got.data)
    plans = read_plans(io.read_table(got.paths.plans))[0]
    lacking = next(p for p in plans.values() if dict(p.model).get("skip"))
    person = rt.client(rt.ctx(0, 0), rt.received(lacking, rt.state0), got.rows[0])
    (result,) = rt.loop().train([person], lacking)
    out = {n for n, t in result.sent.items() if torch.equal(t, rt.state0[n])}
    assert out == {n for n in rt.state0 if n.split(".")[0] in ("model/b1", "model/b2", "model/b3")}


# ------------------------------------------------------------------------------------------- blocks by their bytes
# what the largest unit with all before it, the whole network and two of them need at this batch: 4.9, 15 and 30 MB
ROOM = {"bytes": {4_700_000: 2, 6_500_000: 2, 17_000_000: 1, 34_000_000: 1}}
SIX: dict[str, Any] = {
    "data": {"name": "digits", "rows": 240, "partition": {"kind": "iid", "clients": 6}},
    "model": "preresnet20",
    "rounds": 1,
    "local": {"epochs": 1, "batch": 32, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}},
}


@pytest.mark.parametrize("name", ["fair", "lack", "surplus"])
def test_every_client_is_within_its_bytes(name: str, root: Path) -> None:
    run = make_run({"fedepth": {"scenario": name}}, **SIX, budgets=ROOM, measure="all")
    game = Game(run, root).play()
    peaks = game.opened.rounds.peaks
    assert {p["client"] for p in peaks} == {r["client"] for r in game.trains}
    assert all(p["measured"] <= p["budget"] for p in peaks)
    of = {r["client"]: game.opened.plans[r["plan"]] for r in game.trains}
    assert set(of) == {2, 3, 4, 5}
    assert [p.name for p in of[5].phases] == (["mutual"] if name == "surplus" else ["block1"])
    assert len(of[2].phases) > 2 and len(of[4].phases) == 1


def test_a_client_leaves_out_no_more_than_it_must(root: Path) -> None:
    rt = runtime("preresnet20", {"fedepth": {"scenario": "lack"}}, local={"batch": 32, "optimizer": {"momentum": 0.9}})
    left = {}
    for budget in (4_000_000, 4_700_000, 5_400_000):
        ctx = rt.plan_ctx(Row(budget, 32))
        plan = rt.method.plan(ctx) if rt.method.plan else None
        left[budget] = plan and dict(plan.model).get("skip", 0)
        if plan:
            assert max(p.bytes for p in tried(rt, plan, torch.arange(32))) <= budget
    assert left == {4_000_000: None, 4_700_000: 3, 5_400_000: 0}


def test_a_budget_of_just_what_the_whole_needs_is_one_block() -> None:
    rt = runtime("preresnet20", "fedepth", local={"batch": 32, "optimizer": {"momentum": 0.9}})
    peak = max(rt.predictor.peaks(Plan()))
    counts = []
    for budget in (with_margin(peak, rt.run.margin), with_margin(peak - 1, rt.run.margin)):
        plan = rt.method.plan(rt.plan_ctx(Row(budget, 32))) if rt.method.plan else None
        counts.append(len(plan.phases) if plan else 0)
    assert counts == [1, 2]


def test_units_behind_a_block_do_not_run(root: Path) -> None:
    rt = Game(make_run("fedepth", **SIX, stack=1), root).opened.rt
    first = (fedepth_method.phases(rt.plan_ctx(Row(None, 32)), [("b1", "b2")])[0],)
    plan, ran = rt.levelled(Plan(phases=first)), list[str]()
    rt.layout(rt.chain(plan))  # which runs the whole once
    for unit in rt.chain(plan).names:
        rt.chain(plan).get_submodule(unit).register_forward_hook(lambda *_, unit=unit: ran.append(unit))
    client = rt.client(rt.ctx(0, 0), rt.received(plan, rt.state0), torch.arange(32))
    (result,) = rt.loop().train([client], plan)
    assert set(ran) == {"stem", "b1", "b2", "head"}
    assert {n.split(".")[0] for n, t in result.sent.items() if not torch.equal(t, rt.state0[n])} <= {
        f"model/{u}" for u in ran
    }


def test_equal_peers_teach_each_other_nothing(root: Path) -> None:
    """Then the value is twice the cross-entropy and the gradient that of each alone; and neither's loss moves the
    other."""
    rt = Game(make_run({"fedepth": {"scenario": "surplus"}}, **SIX, precision="float64"), root).opened.rt
    ctx, batch = replace(rt.ctx(0), chain=rt.build()), rt.feed.load(np.arange(16), 16)
    model = {n: t.clone().requires_grad_() for n, t in rt.state0.items()}

    def gradients(peer: Tensors) -> tuple[float, list[Tensor]]:
        at = {**model, **{f"own/peer/{n.removeprefix('model/')}": t for n, t in peer.items()}}
        value, _ = fedepth_method.mutual(at, batch, ctx)
        return float(value.detach()), [*torch.autograd.grad(value, list(model.values()))]

    alone = ctx.task(ctx.forward(model, batch["x"])[0], batch)
    plain = torch.autograd.grad(alone, list(model.values()))
    value, found = gradients({n: t.detach().clone() for n, t in model.items()})
    assert value == pytest.approx(2 * float(alone.detach()), rel=1e-12) and apart(found, plain) <= CLOSE
    other = {n: t.detach() + 0.1 * torch.randn_like(t) for n, t in model.items()}
    assert apart(gradients(other)[1], plain) > 1e-3
    assert all(t.grad is None for t in other.values())


@pytest.mark.parametrize(
    ("method", "keys", "message"),
    [
        ("fedepth_mhead", {"model": "cnn"}, "model cnn: it has no exits, .* must have `behind\\(shape\\)`"),
        (
            {"fedepth": {"scenario": "surplus"}},
            {"budgets": {"scenario": "fair"}},
            "scenario surplus, but budgets.scenario is fair; wanted one of the two",
        ),
        ({"fedepth": {"scenario": "plenty"}}, {}, "scenario: 'plenty'; wanted auto or fair or lack or surplus"),
        ("fedepth", {"budgets": {"bytes": {1000: 6}}}, "budgets: none is enough for method fedepth; it needs .* MiB"),
        ("fedepth", {"model": "linear"}, "model linear: no unit between stem and head"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(method: Any, keys: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(FedpipeError, match=message):
        Game(make_run(method, **{**SIX, **keys}), root)


@pytest.mark.parametrize("faithful", [False, True])
def test_what_is_sent_is_what_was_trained_where_the_mean_is_of_trainers(faithful: bool, root: Path) -> None:
    how = {"average": "trained", "faithful": faithful}
    got = scenario(root, "lack", "fedepth", 1, 128, **how)
    plans = read_plans(io.read_table(got.paths.plans))[0]
    lacking = next(p for p in plans.values() if dict(p.model).get("skip"))
    sent = {n.split(".")[0] for n in got.state(0) if matches(f"model/{n}", lacking.up)}
    assert sent == {"stem", "head", *(f"b{k}" for k in range(4, 10))}


def test_heads_that_were_trained_are_sent_or_all_where_the_mean_is_the_published(root: Path) -> None:
    for faithful in (False, True):
        got = scenario(root, "fair", "fedepth_mhead", 1, 128, faithful=faithful)
        ups = [
            {n.split(".")[0] for n in got.state(0) if matches(f"model/{n}", p.up)}
            for p in read_plans(io.read_table(got.paths.plans))[0].values()
        ]
        if faithful:
            assert ups == [{n.split(".")[0] for n in got.state(0)}] * 4
            continue
        ends = [{f"exit_b{b[-1]}" for b in PUBLISHED[r] if b[-1] < 9} | {"head"} for r in GROUPS["fair"]]
        assert sorted(sorted(u for u in up if "exit" in u or u == "head") for up in ups) == sorted(map(sorted, ends))


@pytest.mark.parametrize("average", ["all", "trained"])
def test_what_a_client_of_six_blocks_sends_as_published(average: str, root: Path) -> None:
    """Heads times their weights; where the mean is of trainers, what it trained, as it is."""
    got = scenario(root, "fair", "fedepth_mhead", 1, 128, faithful=True, average=average)
    rt = Runtime(got.run, got.data)
    six = next(p for p in read_plans(io.read_table(got.paths.plans))[0].values() if len(p.phases) == 6)
    person = rt.client(rt.ctx(0, 0), rt.received(six, rt.state0), got.rows[0])
    (result,) = rt.loop().train([person], six)
    units = {n.split(".")[0].removeprefix("model/") for n in result.sent}
    trained = {"stem", "head", *(f"b{k}" for k in range(1, 7)), *(f"exit_b{k}" for k in (1, 2, 3, 4, 6))}
    assert units == (trained if average == "trained" else {n.split(".")[0] for n in got.state(0)})
    weights = {1: 4, 2: 2, 3: 2, 4: 2, 5: 0} if average == "all" else {}
    for n, t in result.sent.items():
        weight = next((w for k, w in weights.items() if n.startswith(f"model/exit_b{k}.")), 1)
        assert torch.equal(t, weight * result.at[n]), n


def test_a_client_that_trains_a_peer_sends_no_head_that_weighs(root: Path) -> None:
    got = scenario(root, "surplus", "fedepth_mhead", 1, 128, faithful=True)
    rt = Runtime(got.run, got.data)
    plan = next(p for p in read_plans(io.read_table(got.paths.plans))[0].values() if p.keep)
    (result,) = rt.loop().train([rt.client(rt.ctx(0, 0), rt.received(plan, rt.state0), got.rows[3])], plan)
    assert {n for n in rt.state0} == {*result.sent}
    zero = {n.split(".")[0] for n, t in result.sent.items() if n.endswith("linear.weight") and not t.any()}
    assert zero == {f"model/exit_b{k}" for k in (1, 2, 3, 4, 5)}
