"""Methods that give clients a part of the network, by width or depth: re-statements, and what each says of itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import IID, Game, distance, equal, make_run
from oracles import depthfl, draws, heterofl, plain, split_mix
from played import CLOSE, Played, apart, local, play
from torch import Tensor

from fedpipe import io
from fedpipe.errors import FedpipeError
from fedpipe.plans import read_plans
from fedpipe.types import Tensors, under

DATA = {"name": "digits", "rows": 200, "size": 8, "partition": {"kind": "dirichlet", "alpha": 0.5, "clients": 3}}
MLP: dict[str, Any] = {"data": DATA, "model": {"name": "mlp", "hidden": [12, 10, 10]}, "rounds": 2, "cohort": 3}
WIDTHS = {0.25: 1, 0.5: 1, 1.0: 1}  # clients 0, 1, 2


def parts(got: Played) -> dict[int, Any]:
    """The plan of each client."""
    plans = read_plans(io.read_table(got.paths.plans))[0]
    rows = io.read_table(got.paths.assignment).to_pylist()
    return {r["client"]: plans[r["plan"]] for r in rows if r["plan"] and r["round"] == 0}


# ------------------------------------------------------------------------------------------------------------- FedRolex
def test_fedrolex(root: Path) -> None:
    got = play(root, methods=["fedrolex"], every=1, local=local(2), margin=0.2, budgets={"like_width": WIDTHS}, **MLP)
    w = got.mlp(0)
    last = len(w) - 2
    for t in range(2):
        ends = list[tuple[list[list[list[int]]], plain.Weights]]()
        for i, rate in enumerate(WIDTHS):
            where = [heterofl.rolled(tuple(x.shape), rate, k == 0, k >= last, t) for k, x in enumerate(w)]
            slim = [x[np.ix_(*mine)] for x, mine in zip(w, where, strict=True)]
            ends.append((where, plain.sgd(slim, got.batches(t, i), 0.05, momentum=0.9, decay=5e-4, rate=rate)))
        w = [
            torch.from_numpy(heterofl.mean_of(x.numpy(), [(where[k], e[k].numpy()) for where, e in ends]))
            for k, x in enumerate(w)
        ]
        assert apart(w, got.mlp(t + 1)) <= CLOSE
    assert heterofl.rolled((6, 6), 0.5, False, False, 1)[0] == [5, 0, 1], "the published code's second round"
    fixed = play(root, methods=["heterofl"], local=local(2), margin=0.2, budgets={"like_width": WIDTHS}, **MLP)
    assert apart(got.mlp(2), fixed.mlp(2)) > 1e-2


def test_a_window_that_rolls_trains_every_entry(root: Path) -> None:
    reached = {}
    for method in ("fedrolex", "heterofl"):
        keys = {"budgets": {"like_width": {0.25: 6}}, "rounds": 16, "local": {"epochs": 1, "batch": 16}}
        game = Game(make_run({method: {"widths": [0.25]}}, **keys), root)
        begin = game.state["model/h1.1.weight"]
        moved = game.play().state["model/h1.1.weight"] != begin
        reached[method] = int(moved.any(1).sum())
    assert reached == {"fedrolex": 16, "heterofl": 4}


# ------------------------------------------------------------------------------------------------------------- HeteroFL
def test_rows_of_the_classifier_are_of_those_who_have_the_label(root: Path) -> None:
    keys: dict[str, Any] = {"data": {**IID["data"], "partition": {"kind": "shards", "shards": 2, "clients": 6}}}
    keys |= {"rounds": 1, "cohort": 3}
    whole, mine = (Game(make_run({"heterofl": {"labels": on}}, **keys), root) for on in (False, True))
    begin, seen = mine.state, mine.opened.training
    mixed = mine.play(1).state
    cohort = {s.row["client"] for s in mine.sent}
    labels = {int(y) for c in cohort for y in mine.opened.rt.data.y[seen[c]]}
    name = next(n for n in begin if n.startswith("model/head") and n.endswith("weight"))
    assert 1 < len(labels) < 10
    for row in range(10):
        holders = [s for s in mine.sent if row in mine.opened.rt.data.y[seen[s.row["client"]]]]
        sent = [io.decode(s.image)[0][name][row] for s in holders if s.image]
        wanted = torch.stack(sent).mean(0) if sent else begin[name][row]
        assert float((mixed[name][row] - wanted).abs().max()) < 1e-6
    free = whole.play(1).state
    assert distance(mixed, free) > 1e-4
    assert equal(
        {n: t for n, t in mixed.items() if "head" not in n}, {n: t for n, t in free.items() if "head" not in n}
    )


def test_a_gradient_is_clipped_by_its_norm(root: Path) -> None:
    keys: dict[str, Any] = {"rounds": 1, "local": {"epochs": 1, "batch": 256, "optimizer": {"lr": 1.0}}}
    game = Game(make_run({"heterofl": {"clip": 0.01}}, **keys), root)
    begin = game.state
    game.play(1)
    for s in game.sent:
        sent = io.decode(s.image)[0] if s.image else {}
        step = torch.cat([(sent[n] - begin[n]).flatten() for n in sent])
        assert float(step.norm()) == pytest.approx(0.01, rel=1e-3)


# -------------------------------------------------------------------------------------------------------------- DepthFL
def layers(state: Tensors, units: list[str]) -> list[depthfl.Layer]:
    return [(state[f"{u}.1.weight"], state[f"{u}.1.bias"]) for u in units]


BODY, HEADS = ["stem", "h1", "h2"], ["exit_h1", "head"]
DEPTHS = {"bytes": {42_000: 2, 60_000: 1}}  # what the first part and both need: 40,547 and 53,114


@pytest.mark.parametrize("distil", [True, False])
def test_depthfl(distil: bool, root: Path) -> None:
    method = {"depthfl": {"exits": 2, "distil": distil, "ramp": 2}}
    got = play(root, methods=[method], local=local(2), budgets=DEPTHS, **MLP)
    deep = {i: 1 + ("model/head.*" in p.down) for i, p in parts(got).items()}
    assert deep == {0: 1, 1: 1, 2: 2} and len(set(got.samples(range(3)))) == 3
    body, heads = layers(got.state(0), BODY), layers(got.state(0), HEADS)
    for t in range(2):
        weight = depthfl.pull(t, 2) if distil else 0.0
        ends = [
            depthfl.client(body[: d + 1], heads[:d], got.batches(t, i), 0.05, 0.9, 5e-4, weight)
            for i, d in deep.items()
        ]
        body = [depthfl.mean(x, [b[k] for b, _ in ends if k < len(b)]) for k, x in enumerate(body)]
        heads = [depthfl.mean(x, [h[k] for _, h in ends if k < len(h)]) for k, x in enumerate(heads)]
    state = got.state(2)
    for ours, theirs in zip([*body, *heads], [*layers(state, BODY), *layers(state, HEADS)], strict=True):
        assert apart(list(ours), list(theirs)) <= CLOSE
    assert apart([*heads[1]], [*layers(got.state(0), HEADS)[1]]) > 1e-2
    point = io.read_table(got.paths.curve(2)).to_pylist()[-1]
    x, y = got.batch(torch.cat([got.test_rows[i] for i in range(3)]).sort().values)
    z = torch.stack(depthfl.outputs(body, heads, x)).mean(0)
    assert point["loss"] == pytest.approx(float(plain.cross_entropy(z, y)), rel=1e-9)


def test_classifiers_that_teach_each_other_are_nearer(root: Path) -> None:
    apart_by = []
    for distil in (False, True):
        method = {"depthfl": {"exits": 2, "distil": distil, "ramp": 1}}
        game = Game(make_run(method, rounds=6, local={"epochs": 4, "batch": 16, "optimizer": {"lr": 0.2}}), root).play()
        rt, state = game.opened.rt, under(game.state, "model/", "model/")
        x, _ = rt.data.batch(game.opened.training[0], rt.dtype)
        ctx = rt.ctx(role="eval")
        (a, b), _ = _exits(rt, state, x, ctx)
        apart_by.append(float((a.softmax(1) - b.softmax(1)).abs().mean()))
    assert apart_by[1] < 0.9 * apart_by[0]


def _exits(rt: Any, state: Tensors, x: Tensor, ctx: Any) -> Any:
    chain = rt.build()
    with torch.no_grad():
        return replace(ctx, chain=chain).exits(state, x, ("h1", "h2"))


# ------------------------------------------------------------------------------------------------------------ Split-Mix
def test_split_mix(root: Path) -> None:
    """Four bases; by their budgets clients train one, two and all four."""
    got = play(root, methods=[{"split_mix": {"atom": 0.25}}], every=1, local=local(2), margin=0.2,
               budgets={"like_width": WIDTHS}, budget="off", **MLP)  # fmt: skip
    names = ["model/", "base/1/", "base/2/", "base/3/"]
    bases = [got.mlp(0, n) for n in names]
    assert [x.shape[0] for x in bases[0][::2]] == [3, 3, 3, 10]
    assert min(apart(bases[0], b) for b in bases[1:]) > 1e-2, "each has values of its own"
    counts = {i: len(p.phases) for i, p in parts(got).items()}
    assert counts == {0: 1, 1: 2, 2: 4}
    for t in range(2):
        ends = []
        for i, most in counts.items():
            picked = draws.bases(got.run.seed, t, i, 4, most)
            assert len(set(picked)) == most
            trained = {b: plain.sgd(bases[b], got.batches(t, i, j), 0.05, momentum=0.9, decay=5e-4)
                       for j, b in enumerate(picked)}  # fmt: skip
            ends.append((len(got.rows[i]), trained))
        bases = split_mix.server(bases, ends)
        for n, ours in zip(names, bases, strict=True):
            assert apart(ours, got.mlp(t + 1, n)) <= CLOSE
    point = io.read_table(got.paths.curve(2)).to_pylist()[-1]
    x, y = got.batch(torch.cat([got.test_rows[i] for i in range(3)]).sort().values)
    z = torch.stack([plain.logits(b, x) for b in bases]).mean(0)
    assert point["loss"] == pytest.approx(float(plain.cross_entropy(z, y)), rel=1e-9)


def test_a_client_receives_and_sends_the_bases_it_trains(root: Path) -> None:
    keys = {"budgets": {"like_width": {0.25: 3, 0.5: 3}}, "margin": 0.2, "rounds": 4, "budget": "off"}
    game = Game(make_run({"split_mix": {"atom": 0.25}}, **keys), root)
    one = sum(t.numel() * 4 for n, t in game.state.items() if n.startswith("model/"))
    game.play()
    seen = set()
    for s in game.sent:
        sent = {n.rsplit("/", 1)[0] for n in io.decode(s.image)[0]} if s.image else set()
        count = 1 if s.row["client"] < 3 else 2
        assert len(sent) == count
        assert s.metrics[0]["payload_down"] == s.metrics[0]["payload_up"] == count * one
        seen |= sent
    assert seen == {"model", "base/1", "base/2", "base/3"}, "all are visited"


def test_a_budget_below_an_atom_is_refused(root: Path) -> None:
    keys = {"budgets": {"like_width": {0.125: 3, 1.0: 3}}, "margin": 0.2}
    with pytest.raises(FedpipeError, match=r"split_mix: ratio 0.125 trains no base of width 0.25; lower atom"):
        Game(make_run({"split_mix": {"atom": 0.25}}, **keys), root)


# ------------------------------------------------------------------------------- EmbracingFL, InclusiveFL, ProgFed
def test_embracingfl_trains_what_fits_from_the_end(root: Path) -> None:
    keys = {**MLP, "name": "t", "local": local(1), "budgets": {"bytes": {30_000: 1, 60_000: 2}}, "precision": "float64"}
    game = Game(make_run("embracingfl", keys), root)
    begin = game.state
    game.play(1)
    sent = {s.row["client"]: {n.split(".")[0] for n in io.decode(s.image)[0]} for s in game.sent if s.image}
    weak, strong = sent[0], sent[1]
    assert weak == {"model/h2", "model/head"} and strong == {f"model/{u}" for u in ("stem", "h1", "h2", "head")}
    alone = {**keys, "budgets": {"bytes": {30_000: 3}}}
    only = Game(make_run("embracingfl", alone), root).play(1).state
    still = {n for n in begin if torch.equal(begin[n], only[n])}
    assert {n.split(".")[0] for n in still} == {"model/stem", "model/h1"}


def test_inclusivefl_layers_learn_from_the_larger_size(root: Path) -> None:
    """Two sizes; what the smaller brings for its last layer is moved by what the larger's brought a round ago."""
    keys: dict[str, Any] = {**MLP, "name": "t", "precision": "float64", "budgets": {"bytes": {36_500: 2, 50_000: 1}}}
    keys["local"] = local(1)
    method = {"inclusivefl": {"sizes": 2, "beta": 0.25}}
    keys["model"] = {"name": "mlp", "hidden": [10, 10, 10]}
    game, plain_mean = (
        Game(make_run(method, keys), root),
        Game(make_run({"inclusivefl": {"sizes": 2, "beta": 0.0}}, keys), root),
    )
    x0 = game.state
    x1, same = game.play(1).state, plain_mean.play(1).state
    assert equal(under(x1, "model/"), under(same, "model/")), "in the first round there is none"
    (large,) = (io.decode(s.image)[0] for s in game.sent if s.row["client"] == 2 and s.image)
    name = "1.weight"
    brought = torch.stack([large[f"model/{u}.{name}"] - x0[f"model/{u}.{name}"] for u in ("h1", "h2")]).mean(0)
    assert float((x1[f"server/0/{name}"] - brought).abs().max()) < CLOSE
    game.play(1)
    total, weights = torch.zeros_like(brought), 0.0
    for s in game.sent[-3:]:
        sent, meta = io.decode(s.image or b"")
        t = sent[f"model/h1.{name}"]
        if s.row["client"] != 2:
            t = 0.75 * t + 0.25 * (x1[f"model/h1.{name}"] + brought)
        total, weights = total + meta["weight"] * t, weights + meta["weight"]
    assert float((game.state[f"model/h1.{name}"] - total / weights).abs().max()) < CLOSE


def test_progfed_grows(root: Path) -> None:
    keys = {"rounds": 8, "local": {"epochs": 1, "batch": 16, "optimizer": {"lr": 0.1}}}
    game = Game(make_run({"progfed": {"stages": 2, "warmup": 1}}, **keys), root)
    states = [game.state]
    trained = []
    for _ in range(8):
        states.append(game.play(1).state)
        before, after = states[-2], states[-1]
        trained.append({n.split("/")[1].split(".")[0] for n in after
                        if n.startswith("model/") and not torch.equal(before[n], after[n])})  # fmt: skip
    small = {"stem", "h1", "exit_h1"}
    assert trained[:2] == [small, small] and trained[2] == {"h2", "head"}, "stage 1 for T / 2S, then one to warm up"
    assert trained[3:] == [{"stem", "h1", "h2", "head"}] * 5
    assert [int(s["server/stage"]) for s in states] == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    sizes = [s.metrics[0]["payload_down"] for s in game.sent]
    assert sizes[0] < sizes[-1]


# ---------------------------------------------------------------------------------------------------------------- FedFA
def test_fedfa_grafts_and_scales(root: Path) -> None:
    """Clients of two depths and two widths; the mean by a straight-line re-statement."""
    keys: dict[str, Any] = {**MLP, "name": "t", "local": local(1), "precision": "float64"}
    keys["model"] = {"name": "mlp", "hidden": [8, 8, 8, 8]}
    method = {"fedfa": {"widths": [1.0, 0.5], "depths": [1.0, 0.5], "quantile": 0.9}}
    game = Game(make_run(method, {**keys, "budgets": {"bytes": {23_000: 1, 33_000: 1, 60_000: 1}}}), root)
    begin = game.state
    state = game.play(1).state
    sent = {s.row["client"]: io.decode(s.image or b"") for s in game.sent}
    held = {i: sorted({n.split(".")[0][6:] for n in tensors}) for i, (tensors, _) in sent.items()}
    assert held == {
        0: ["h1", "h2", "head", "stem"],
        1: ["h1", "h2", "head", "stem"],
        2: ["h1", "h2", "h3", "head", "stem"],
    }
    shapes = {i: tuple(tensors["model/h1.1.weight"].shape) for i, (tensors, _) in sent.items()}
    assert shapes == {0: (4, 4), 1: (8, 8), 2: (8, 8)}
    for i in (0, 1):
        sent[i][0].update({f"model/h3.{k}": sent[i][0][f"model/h2.{k}"] for k in ("1.weight", "1.bias")})
    for name, old in begin.items():
        each = [sent[i][0][name] for i in range(3)]
        norms = []
        for t in each:
            size = t.abs().flatten().sort().values
            kept = size[: int(np.ceil(0.9 * len(size) - 1e-9))]
            norms.append(float((kept**2).sum().sqrt()))
        total, count = torch.zeros_like(old), torch.zeros_like(old)
        for i, t in enumerate(each):
            at = tuple(slice(k) for k in t.shape)
            weight = sent[i][1]["weight"]
            total[at] += weight * t * (sum(norms) / 3 / norms[i])
            count[at] += weight
        wanted = torch.where(count > 0, total / count.clamp(min=1e-9), old)
        assert float((state[name] - wanted).abs().max()) < CLOSE, name
