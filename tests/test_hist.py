"""HIST, and the route of two levels: nodes whose states are mixed from other states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import SKEWED, Game, equal, make_run
from oracles import plain
from played import CLOSE, SGD, apart, local, play
from torch import Tensor

from fedpipe import io
from fedpipe.config import ModelSpec
from fedpipe.context import Ctx, RouteCtx
from fedpipe.errors import FedpipeError
from fedpipe.folding import foldable, played
from fedpipe.methods import hist
from fedpipe.models.build import load
from fedpipe.models.chain import Chain
from fedpipe.rng import rng
from fedpipe.route import needed_states
from fedpipe.seeding import seeded
from fedpipe.states import Needs
from fedpipe.steps import aggregate as mix
from fedpipe.steps import train
from fedpipe.stopping import Watch
from fedpipe.types import Mix, Tensors, Train, under

FIVE = {"name": "digits", "rows": 200, "size": 8, "partition": {"kind": "dirichlet", "alpha": 0.5, "clients": 5}}
MLP: dict[str, Any] = {"data": FIVE, "model": {"name": "mlp", "hidden": [12, 10]}, "cohort": 3}
MEANS = f"""
from fedpipe.types import Method
from {hist.__name__} import route

method = Method(route=route, h={{"cells": 2, "period": 2}})
"""


def ctx_of(chain: Chain, round: int = 0, client: int = 0, cells: int = 2, seed: int = 0) -> Ctx:
    return Ctx({"cells": cells, "period": 2}, seed, clients=6, classes=10, round=round, client=client, chain=chain)


def net(name: str, shape: tuple[int, int, int] = (3, 16, 16), **keys: Any) -> tuple[Chain, Tensors]:
    with seeded(0):
        chain = load(ModelSpec(name=name, **keys), shape, 10)
    return chain, {f"in/model/{n}": t.detach() for n, t in chain.state_dict().items()}


def masks(chain: Chain, received: Tensors, cells: int = 2, **keys: Any) -> list[Tensors]:
    """The mask of each cell, as its client begins with it."""
    return [
        under(hist.begin(received, ctx_of(chain, client=c, cells=cells, **keys)), "tmp/mask/") for c in range(cells)
    ]


# ------------------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("name", ["mlp", "linear", "cnn", "cnn4", "preresnet20", "resnet18", "simple_cnn", "vit_tiny"])
@pytest.mark.parametrize("cells", [2, 3])
def test_masks_are_disjoint_and_whole_and_redrawn(name: str, cells: int) -> None:
    chain, received = net(name)
    drawn = [masks(chain, received, cells, round=t) for t in range(6)]
    floating = {n for n, t in chain.state_dict().items() if t.is_floating_point()}
    for each in drawn:
        assert all(m.keys() == floating for m in each)
        assert all(bool((torch.stack([m[n] for m in each]).sum(0) == 1).all()) for n in floating)
    for t in range(0, 6, 2):
        assert all(equal(*pair) for pair in zip(drawn[t], drawn[t + 1], strict=True)), "one draw in a global round"
    for t in (0, 2):
        assert not all(equal(*pair) for pair in zip(drawn[t], drawn[t + 2], strict=True))


def test_every_part_is_a_narrow_network() -> None:
    """What a cell trains gives what the network built of its hidden units alone would give."""
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    chain, received = net("mlp", (1, 4, 4), hidden=[16, 16, 12])
    narrow, _ = net("mlp", (1, 4, 4), hidden=[8, 8, 6])
    for c, mask in enumerate(masks(chain, received)):
        worked = under(hist.begin(received, ctx_of(chain, client=c)), "model/")
        inward, small = torch.arange(16), dict[str, Tensor]()
        for unit in ("stem", "h1", "h2", "head"):
            w, b = f"{unit}.1.weight", f"{unit}.1.bias"
            outward = torch.arange(10) if unit == "head" else mask[b].nonzero().flatten()
            small |= {w: worked[w][outward][:, inward], b: worked[b][outward]}
            inward = outward
        assert {n: t.shape for n, t in small.items()} == {n: t.shape for n, t in narrow.state_dict().items()}
        ours, theirs = (torch.func.functional_call(m, p, (x,)) for m, p in ((chain, worked), (narrow, small)))
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_channels_that_the_head_takes_pixel_by_pixel_go_whole() -> None:
    chain, received = net("cnn4")
    each = masks(chain, received)
    head = [n for n in chain.tensor_names if n.startswith("head.") and n.endswith("weight")][-1]
    last = next(n for n in reversed(chain.tensor_names) if not n.startswith("head."))
    for mask in each:
        channels = mask[last].flatten(1)[:, 0] if mask[last].dim() > 1 else mask[last]
        assert torch.equal(mask[head].view(10, len(channels), -1).all(-1), channels.expand(10, -1))
        assert int(channels.sum()) * 2 == len(channels)


@pytest.mark.parametrize("keys", [{"cells": 0}, {"period": 0}])
def test_bad_settings_are_said(keys: dict[str, int], root: Path) -> None:
    with pytest.raises(FedpipeError, match=r"methods.hist: .*wanted 1 or more"):
        Game(make_run({"hist": keys}), root)


# ------------------------------------------------------------------------------------------------------------ rounds
def owned(game: Game, t: int) -> Tensors:
    """By name the cell of every entry in round t."""
    rt, model = game.opened.rt, under(game.state, "model/")
    cells = hist.owners(model, replace(rt.ctx(t), chain=rt.build()))
    return {f"model/{n}": cell.expand(model[n].shape) for n, cell in cells.items()}


def test_the_cloud_takes_every_entry_from_the_edge_that_has_it(root: Path) -> None:
    game = Game(make_run("hist", SKEWED, rounds=4), root)
    for t in range(4):
        before = game.world.states
        game.play(1)
        now, cell = game.world.states, owned(game, t)
        edges = [now[f"e{c}@{t + 1}"] for c in range(2)]
        for n, old in before[f"server@{t}"].items():
            for c, edge in enumerate(edges):
                mine, start = cell[n] == c, before[f"e{c}@{t}"] if t % 2 else before[f"server@{t}"]
                assert torch.equal(edge[n][~mine], start[n][~mine]), "an edge keeps what it does not have"
                if t % 2:
                    assert torch.equal(game.state[n][mine], edge[n][mine])
            assert t % 2 or torch.equal(game.state[n], old), "between two syncs the server stays"
        assert all(not equal(e, before[f"server@{t}"]) for e in edges), "edges move in every round"
        assert equal(game.state, before[f"server@{t}"]) == (t % 2 == 0)


def test_what_a_cell_without_clients_has_stays(root: Path) -> None:
    game = Game(make_run({"hist": {"period": 1}}, SKEWED, cohort=1), root)
    for t in range(3):
        before = game.state
        game.play(1)
        (sent,) = (s.row["client"] for s in game.sent if s.row["round"] == t)
        assert equal(game.world.states[f"e{1 - sent % 2}@{t + 1}"], before)
        cell = owned(game, t)
        assert all(torch.equal(game.state[n][cell[n] != sent % 2], t[cell[n] != sent % 2]) for n, t in before.items())
        assert not equal(game.state, before)


@pytest.mark.parametrize("optimizer", [SGD, {"name": "adam", "lr": 0.01}], ids=["sgd", "adam"])
@pytest.mark.parametrize("stack", [1, 8])
def test_what_is_masked_stays_nought(stack: int, optimizer: dict[str, Any], root: Path) -> None:
    run = make_run("hist", SKEWED, stack=stack, local={"epochs": 1, "batch": 16, "optimizer": optimizer})
    game = Game(run, root).play()
    assert game.largest_group == 1 if stack == 1 else game.largest_group > 1
    for s in game.sent:
        cell = owned(game, s.row["round"])
        for n, t in io.decode(s.image or b"")[0].items():
            mine = cell[n] == s.row["client"] % 2
            assert not t[~mine].any()
            assert t[mine].any() or not mine.any()


# ------------------------------------------------------------------------------------------------------------ oracle
def masked_sgd(w: plain.Weights, mask: plain.Weights, batches: list[plain.Batch], lr: float, momentum: float,
               decay: float) -> plain.Weights:  # fmt: skip
    w = [m * t for m, t in zip(mask, w, strict=True)]
    v = [torch.zeros_like(t) for t in w]
    for batch in batches:
        g = plain.gradient(w, batch)
        for i, m in enumerate(mask):
            v[i] = momentum * v[i] + g[i] + decay * w[i]
            w[i] = m * (w[i] - lr * v[i])
    return w


def drawn_masks(w: plain.Weights, k: int, cells: int, seed: int) -> list[plain.Weights]:
    """Of each cell, for an MLP [W1, b1, ...]: by output units, the last W by its input units, the last b by turns."""

    def units(count: int) -> Tensor:
        return torch.tensor(rng(seed, k, None, "cells").permutation(count) * cells // count)

    owner = [units(len(t)) for t in w[:-2]] + [units(w[-2].shape[1]), torch.tensor([k % cells])]
    shapes = [(-1, 1) if t.dim() == 2 else (-1,) for t in w[:-2]] + [(1, -1), (-1,)]
    return [[(o == c).view(s).expand(t.shape).double() for o, s, t in zip(owner, shapes, w, strict=True)]
            for c in range(cells)]  # fmt: skip


@pytest.mark.parametrize("cells", [1, 2])
def test_hist_as_two_loops(cells: int, root: Path) -> None:
    got = play(root, rounds=5, methods=[{"hist": {"cells": cells, "period": 2}}], local=local(2), **MLP)
    server, seed = got.mlp(0), got.run.seed
    states = [server]
    edges: list[plain.Weights] = []
    for t, cohort in enumerate(got.cohorts()):
        mask = drawn_masks(server, t // 2, cells, seed)
        edges = edges if t % 2 else [server] * cells
        for c in range(cells):
            there = [i for i in cohort if i % cells == c]
            if there:
                sent = [masked_sgd(edges[c], mask[c], got.batches(t, i), *SGD.values()) for i in there]
                mean = plain.mean(sent, got.samples(there))
                edges[c] = [m * new + (1 - m) * old for m, new, old in zip(mask[c], mean, edges[c], strict=True)]
        if t % 2:
            server = [sum(p * x for p, x in zip(ps, xs, strict=True))
                      for ps, xs in zip(zip(*mask, strict=True), zip(*edges, strict=True), strict=True)]  # fmt: skip
        states.append(server)
    assert apart(states[2], states[0]) > 1e-2 and apart(states[4], states[2]) > 1e-2
    assert apart(got.mlp(5), states[5]) <= CLOSE and apart(states[5], states[4]) == 0


def test_states_are_averaged_where_a_method_says_nothing_else(root: Path, tmp_path: Path) -> None:
    """Hierarchical FedAvg: the mean over clients at each edge, over edges at the cloud."""
    (tmp_path / "means.py").write_text(MEANS)
    got = play(root, rounds=4, methods=[f"{tmp_path}/means.py:method"], local=local(1), **MLP)
    server = got.mlp(0)
    edges: list[plain.Weights] = []
    for t, cohort in enumerate(got.cohorts()):
        edges = edges if t % 2 else [server] * 2
        for c in range(2):
            there = [i for i in cohort if i % 2 == c]
            sent = [plain.sgd(edges[c], got.batches(t, i), 0.05, momentum=0.9, decay=5e-4) for i in there]
            edges[c] = plain.mean(sent, got.samples(there)) if there else edges[c]
        server = plain.mean(edges, [1, 1]) if t % 2 else server
    assert apart(server, got.mlp(0)) > 1e-2
    assert apart(server, got.mlp(4)) <= CLOSE


def test_a_wide_layer_is_learnt_part_by_part(root: Path) -> None:
    game = Game(make_run("hist", rounds=8, model={"name": "mlp", "hidden": [64]}), root)
    start = game.opened.point(0, game.world)
    assert game.play().opened.point(8, game.world)["loss"] < 0.5 * start["loss"]


# -------------------------------------------------------------------------------------------------- ways of running
def test_segments_that_end_between_syncs_change_no_byte(tmp_path: Path) -> None:
    keys = {"rounds": 5, "methods": ["hist"], "local": local(1), **MLP}
    whole, cut = play(tmp_path / "whole", **keys), play(tmp_path / "cut", every=1, **keys)
    there = [{f.stem for f in cut.paths.state(t).iterdir()} for t in range(6)]
    for t in range(6):
        assert there[t] == {f"server@{t}"} | ({f"e0@{t}", f"e1@{t}"} if t in (1, 3) else set())
    ours, theirs = (p.paths.state(5) / "server@5.safetensors" for p in (whole, cut))
    assert ours.read_bytes() == theirs.read_bytes()
    assert apart(whole.mlp(0), whole.mlp(5)) > 1e-2


def test_train_jobs_and_their_mix_give_the_same_states(tmp_path: Path) -> None:
    keys = {"rounds": 3, "methods": ["hist"], "local": local(1), **MLP}
    p = play(tmp_path / "cut", every=1, **keys).paths
    shared = {"run": p.spec, "data": p.data, "partition": p.partition, "plans": p.plans, "route": p.route}
    state, own = p.state(0), p.own(0)
    for t in range(3):
        jobs, out = [tmp_path / f"train{t}-{j}" for j in range(2)], tmp_path / f"out{t + 1}"
        for j, folder in enumerate(jobs):
            train.run(**shared, state=state, own=own, out=folder, job=j, jobs=2)
        tables = {k: out / f"{k}.parquet" for k in ("rounds", "curve", "times", "peaks")}
        worlds = {"next_state": out / "state", "next_own": out / "own"}
        mix.run(**shared, state=state, own=own, trained=jobs, **worlds, **tables)
        state, own = out / "state", out / "own"
        files = [{f.name: f.read_bytes() for f in folder.iterdir()} for folder in (state, p.state(t + 1))]
        assert io.read_table(tables["curve"]).equals(io.read_table(p.curve(t + 1)))
        assert files[0] == files[1] and len(files[0]) == (1 if t else 3)  # e0, e1, server between syncs


def test_the_server_is_evaluated(tmp_path: Path) -> None:
    """In a round without a sync, too; and a client has no model of its own, though it trains a part."""
    got = play(tmp_path, rounds=3, methods=["hist"], local=local(1), until="evaluate", **MLP)
    rows = io.read_table(got.paths.metrics).to_pylist()
    assert {r["column"] for r in rows} == {"global"}
    x, y = got.batch(torch.cat(list(got.test_rows.values())).sort().values)
    (pooled,) = (r["loss"] for r in rows if r["client"] is None)
    assert pooled == pytest.approx(float(plain.cross_entropy(plain.logits(got.mlp(3), x), y)), abs=1e-9)


def test_messages_that_are_folded_as_they_come_give_the_same_bits(root: Path, tmp_path: Path) -> None:
    (tmp_path / "means.py").write_text(MEANS)
    run = make_run(f"{tmp_path}/means.py:method", SKEWED, rounds=4, dropout=0.2)
    first, mine = Game(run, root).play(), Game(run, root)
    for t in range(4):
        assert foldable(mine.opened.rounds, t)
        mine.world, sent = played(mine.opened.rounds, t, mine.world, mine.opened.rounds.groups(t))
        mine.sent += sent
    assert first.world.states.keys() == mine.world.states.keys()
    assert all(equal(s, mine.world.states[n]) for n, s in first.world.states.items())
    assert [s.metrics for s in first.sent] == [s.metrics for s in mine.sent]


def test_states_that_others_are_mixed_from_are_needed_till_then(root: Path) -> None:
    game = Game(make_run({"hist": {"cells": 3}}, SKEWED, rounds=6), root)
    rows = game.opened.route
    needs, states = Needs(rows), dict[str, Tensors]({"server@0": {}})
    for t in range(7):
        states = needs.among(states, t)
        assert set(states) == needed_states(rows, t)
        assert set(states) == {f"server@{t}"} | ({f"e{c}@{t}" for c in range(3)} if t % 2 else set())
        states |= {r["out"]: {} for r in rows if r["kind"] == "mix" and r["round"] == t}


def test_a_run_that_has_stopped_mixes_no_states(root: Path) -> None:
    game = Game(make_run("hist", SKEWED, rounds=4), root).play(1)
    server, edges = game.state, [game.world.states[f"e{c}@1"] for c in range(2)]
    game.world.watch = Watch(stopped=1)
    for t in range(1, 4):
        game.world = game.opened.round(t, game.world)
    assert equal(game.world.states["server@4"], server) and equal(game.world.states["e0@2"], edges[0])


def test_a_point_of_the_curve_is_the_servers(root: Path) -> None:
    game = Game(make_run("hist", SKEWED, rounds=2), root)
    before = game.opened.point(0, game.world)
    now = game.play(1).opened.point(0, game.world)
    assert now == before and not equal(game.world.states["e0@1"], game.state)


def test_edges_of_nobody_who_reports_keep_their_state(root: Path) -> None:
    game = Game(make_run("hist", SKEWED, rounds=2, dropout=1.0), root)
    first = game.state
    assert equal(first, game.play().state) and len(game.sent) == 8


def test_an_edge_whose_clients_all_fail_keeps_its_state(root: Path) -> None:
    for failing, message in (((0, 2, 4), None), (range(6), "round 1: every client failed")):
        game = Game(make_run("hist", rounds=2, on_client_failure="drop"), root).play(1)
        rounds, world = game.opened.rounds, game.world
        sent = rounds.train(1, world, rounds.groups(1))
        for s in sent:
            if s.row["client"] in failing:
                s.fail()
        if message:
            with pytest.raises(FedpipeError, match=message):
                rounds.mix(1, world, sent)
            continue
        states = rounds.mix(1, world, sent).states
        assert equal(states["e0@2"], world.states["e0@1"]) and not equal(states["e1@2"], world.states["e1@1"])


# ------------------------------------------------------------------------------------------------------------- route
def route_of(h: dict[str, int], rounds: int) -> list[Train | Mix]:
    return list(hist.route(RouteCtx(0, rounds, 6, 6, h)))


def test_rows_of_the_route() -> None:
    rows = route_of({"cells": 2, "period": 3}, 4)
    assert [r.start for r in rows if isinstance(r, Train)] == [
        *["server@0"] * 6, *["e0@1", "e1@1"] * 3, *["e0@2", "e1@2"] * 3, *["server@3"] * 6,
    ]  # fmt: skip
    mixes = [r for r in rows if isinstance(r, Mix)]
    assert [r.out for r in mixes] == [f"{n}@{t}" for t in range(1, 5) for n in ("e0", "e1", "server")]
    assert mixes[:2] == [
        Mix(0, "e0@1", "server@0", ("0", "2", "4"), "e0"), Mix(0, "e1@1", "server@0", ("1", "3", "5"), "e1"),
    ]  # fmt: skip
    assert [r.base for r in mixes if r.owner == "server"] == [f"server@{t}" for t in range(4)]
    assert [r.states for r in mixes if r.owner == "server"] == [(), (), ("e0@3", "e1@3"), ()]


def test_a_star_has_the_rows_it_had(root: Path) -> None:
    game = Game(make_run("fedavg", SKEWED), root)
    mixes = [r for r in game.opened.route if r["kind"] == "mix"]
    for t, row in enumerate(mixes):
        cohort = [r["client"] for r in game.trains if r["round"] == t]
        assert {k: v for k, v in row.items() if v is not None} == {
            "kind": "mix", "round": t, "part": "", "out": f"server@{t + 1}", "base": f"server@{t}",
            "updates": [str(i) for i in cohort], "states": [], "owner": "server",
        }  # fmt: skip
    assert len(mixes) == 3 and len(game.trains) == 12
    assert {(r["start"], r["states"], r["updates"]) for r in game.trains} == {
        (f"server@{t}", None, None) for t in range(3)
    }
