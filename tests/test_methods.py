"""The battery over the folder of methods: what every method has to be, whatever it does."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import IID, SKEWED, Game, distance, equal, make_run

from fedpipe import io, methods
from fedpipe.states import read_world, write_owns, write_states
from fedpipe.types import PRIVATE, Method, Row, Tensors, select, under

ALL = methods.known()
FOLDER = Path(methods.__file__).parent
SLOW = {"split_mix": {"atom": 0.5}, "hist": {"cells": 1}}  # parts of few channels learn little in eight rounds
KEEPS = {"scaffold"}  # methods whose clients keep something

# method -> its neutral setting, the method it then equals bit for bit on these names, and the study's keys for it.
# Weights are equal, as data is IID. One step: whether the head is live does not touch the body's first gradient.
ONE_STEP = {"rounds": 1, "local": {"epochs": 1, "batch": 64, "optimizer": {"lr": 0.1}}}
IDENTITIES: dict[str, tuple[dict[str, Any], str, tuple[str, ...], dict[str, Any]]] = {
    "fedavg": ({}, "fedavg", ("*",), {}),
    "fedprox": ({"mu": 0.0}, "fedavg", ("*",), {}),
    "fedepth": ({}, "fedavg", ("*",), {}),  # nobody has a limit: one block
    "fedepth_mhead": ({}, "fedavg", ("*", "!exit_*"), {}),
    "heterofl": ({}, "fedavg", ("*",), {}),  # nobody has a limit: full width
    "fedrolex": ({}, "fedavg", ("*",), {}),
    "split_mix": ({"atom": 1.0}, "fedavg", ("*",), {}),
    "depthfl": ({"exits": 1}, "fedavg", ("*",), {}),
    "inclusivefl": ({"sizes": 1}, "fedavg", ("*",), {}),
    "embracingfl": ({}, "fedavg", ("*",), {}),
    "fedfa": ({"scale": False}, "fedavg", ("*",), {}),
    "hist": ({"cells": 1, "period": 1}, "fedavg", ("*",), {}),
    "progfed": ({"stages": 1}, "fedavg", ("*",), {}),
    "scaffold": ({}, "fedavg", ("*",), {"rounds": 1}),  # until the first round has made control variates
    "fedbabu": ({}, "fedavg", ("*", "!head.*"), ONE_STEP),
}


# Small images and a long chain: three budgets, three plans (one, three and four phases).
TIGHT: dict[str, Any] = {
    "data": {**IID["data"], "size": 8},
    "model": {"name": "mlp", "hidden": [48] * 7},
    "budgets": {"bytes": {105_000: 2, 110_000: 2, 160_000: 2}},
}


def model(state: Tensors) -> Tensors:
    return under(state, "model/")


@pytest.mark.parametrize("name", ALL)
def test_one_file_one_paper(name: str) -> None:
    module = importlib.import_module(f"fedpipe.methods.{name}")
    assert isinstance(module.method, Method) and module.method.name == name
    assert "https://" in (module.__doc__ or ""), "the docstring cites the paper"
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 80
    assert all(len(line) <= 120 for line in (FOLDER / f"{name}.py").read_text().splitlines())


@pytest.mark.parametrize("name", ALL)
def test_identity(name: str, root: Path) -> None:
    settings, simpler, names, keys = IDENTITIES[name]
    game, plain = Game(make_run({name: settings}, **keys), root), Game(make_run(simpler, **keys), root)
    begin = model(game.state)
    ours, theirs = (select(model(g.play().state), names) for g in (game, plain))
    assert len(ours) >= 6 and equal(ours, theirs)
    assert distance(ours, select(begin, names)) > 1e-3, "nothing was trained"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("base", [IID, SKEWED], ids=["iid", "skewed"])
def test_stacked_equals_sequential(name: str, base: dict[str, Any], root: Path) -> None:
    alone = Game(make_run(name, base, stack=1), root).play()
    stacked = Game(make_run(name, base, stack=8), root).play()
    assert alone.largest_group == 1
    assert stacked.largest_group >= (5 if base is IID else 2)
    assert distance(stacked.state, alone.state) < 1e-5
    assert stacked.world.owns.keys() == alone.world.owns.keys()
    assert all(distance(stacked.world.own(c), alone.world.own(c)) < 1e-5 for c in alone.world.owns)
    assert bool(alone.world.owns) == (name in KEEPS)


def test_skewed_stacks_hold_clients_of_unequal_steps(root: Path) -> None:
    game = Game(make_run("fedavg", SKEWED, stack=8), root).play(1)
    groups = {s.row["group"]: set[int]() for s in game.sent}
    for s in game.sent:
        groups[s.row["group"]].add(s.metrics[0]["steps"])
    assert max(len(steps) for steps in groups.values()) > 1


@pytest.mark.parametrize("name", ALL)
def test_resume_gives_the_same_bytes(name: str, root: Path, tmp_path: Path) -> None:
    whole = Game(make_run(name, SKEWED), root).play()
    first = Game(make_run(name, SKEWED), root).play(1)
    write_states(tmp_path / "s", first.opened.still_needed(first.world.states, first.t), first.t, {})
    write_owns(tmp_path / "o", first.world.owns, {})
    second = Game(make_run(name, SKEWED), root)
    second.world, second.t = read_world(tmp_path / "s", tmp_path / "o")
    second.play()
    assert io.content_of(second.state) == io.content_of(whole.state)
    assert whole.world.owns.keys() == second.world.owns.keys()
    assert all(equal(whole.world.own(c), second.world.own(c)) for c in whole.world.owns)


@pytest.mark.parametrize("name", ALL)
def test_messages(name: str, root: Path) -> None:
    """Private names are never sent, the bytes counted are the messages' lengths, and what was sent is finite."""
    game = Game(make_run(name, SKEWED), root).play(2)
    assert len(game.sent) == 8
    for s in game.sent:
        assert s.image is not None
        tensors, meta = io.decode(s.image)
        assert tensors and not [n for n in tensors if n.startswith(PRIVATE)]
        assert meta["client"] == s.row["client"]
        first = s.metrics[0]
        assert first["payload_up"] + first["header_up"] == len(s.image)
        assert first["payload_up"] == sum(t.numel() * t.element_size() for t in tensors.values())
        assert first["payload_down"] > 0 and not any(m["payload_up"] for m in s.metrics[1:])


@pytest.mark.parametrize("name", ALL)
def test_learns_and_leaves_global_generators_alone(name: str, root: Path) -> None:
    game = Game(make_run({name: SLOW.get(name, {})}, rounds=8), root)
    before = torch.get_rng_state()
    start = game.opened.point(0, game.world)
    end = game.play().opened.point(8, game.world)
    assert end["loss"] < 0.9 * start["loss"]
    assert bool((torch.get_rng_state() == before).all())


# ------------------------------------------------------------------------------------------ claims of single methods
def test_fedprox_stays_nearer_to_what_it_received(root: Path) -> None:
    far = [
        distance(g.play(1).state, begin)
        for mu in (0.0, 5.0)
        for g in [Game(make_run({"fedprox": {"mu": mu}}), root)]
        for begin in [g.state]
    ]
    assert far[1] < 0.8 * far[0]


def test_fedbabu_head_never_moves_and_never_travels(root: Path) -> None:
    game = Game(make_run("fedbabu", SKEWED), root)
    head = select(game.state, ("model/head.*",))
    game.play()
    assert len(head) == 2 and equal(select(game.state, ("model/head.*",)), head)
    sent = [set(io.decode(s.image)[0]) for s in game.sent if s.image]
    body = {n for n in game.state if not n.startswith("model/head.")}
    assert all(names == body for names in sent)
    down = {s.metrics[0]["payload_down"] for s in game.sent}
    assert down == {sum(game.state[n].numel() * 4 for n in body)}


@pytest.mark.parametrize(
    ("part", "moved"), [("full", {"stem", "h1", "h2", "head"}), ("body", {"stem", "h1", "h2"}), ("head", {"head"})]
)
def test_fedbabu_finetunes_the_part_it_is_told(part: str, moved: set[str], root: Path) -> None:
    game = Game(make_run({"fedbabu": {"part": part, "finetune_epochs": 1}}), root)
    rt = game.opened.rt
    plan = rt.method.finish(rt.plan_ctx(Row(None, 40)))  # type: ignore[misc]
    client = rt.client(
        rt.ctx(client=0, role="eval"), {f"in/{n}": t for n, t in game.state.items()}, game.opened.training[0]
    )
    at = rt.loop().train([client], plan)[0].at
    assert {n.split("/")[1].split(".")[0] for n, t in game.state.items() if not equal({n: at[n]}, {n: t})} == moved


def test_local_steps_are_shared_out_among_phases(root: Path) -> None:
    keys = {**TIGHT, "local": {"batch": 16, "steps": 10, "optimizer": {"lr": 0.1}}}
    game = Game(make_run("fedepth", **keys), root).play(1)
    steps = {tuple(m["steps"] for m in s.metrics) for s in game.sent}
    assert steps == {(10,), (4, 3, 3), (3, 3, 2, 2)}
    whole = Game(make_run("fedavg", local={"batch": 16, "steps": 6, "optimizer": {"lr": 0.1}}), root).play()
    epochs = Game(make_run("fedavg", local={"batch": 16, "epochs": 2, "optimizer": {"lr": 0.1}}), root).play()
    assert {s.metrics[0]["steps"] for s in epochs.sent} == {6} and equal(whole.state, epochs.state)


@pytest.mark.parametrize("part", ["body", "head"])
def test_fedavg_trains_and_sends_the_part_it_is_told(part: str, root: Path) -> None:
    game = Game(make_run({"fedavg": {"part": part}}), root)
    begin, state = game.state, game.play().state
    mine = {n for n in begin if n.startswith("model/head.") == (part == "head")}
    assert {n for n in begin if not torch.equal(begin[n], state[n])} == mine and len(mine) in (2, 6)
    assert all(set(io.decode(s.image)[0]) == mine for s in game.sent if s.image)
    assert {s.metrics[0]["payload_down"] for s in game.sent} == {sum(begin[n].numel() * 4 for n in mine)}


def test_the_body_of_fedavg_is_that_of_fedbabu(root: Path) -> None:
    ours, theirs = (Game(make_run(m), root).play().state for m in ({"fedavg": {"part": "body"}}, "fedbabu"))
    assert equal(ours, theirs)


def test_heterofl_keeps_what_nobody_holds(root: Path) -> None:
    keys = {"budgets": {"like_width": {0.5: 4, 0.25: 2}}}
    game = Game(make_run({"heterofl": {"widths": [1.0, 0.5, 0.25]}}, **keys), root)
    assert sorted(dict(p.model)["width"] for p in game.opened.plans.values()) == [0.25, 0.5]
    begin, state = game.state, game.play(1).state
    w, old = state["model/h1.1.weight"], begin["model/h1.1.weight"]
    moved = w != old
    assert moved[:8, :8].all() and not moved[8:].any() and not moved[:, 8:].any()


def test_fedepth_trains_block_by_block_and_sends_everything(root: Path) -> None:
    game = Game(make_run("fedepth", **TIGHT), root)
    assert sorted(len(p.phases) for p in game.opened.plans.values()) == [1, 3, 4]
    game.play(1)
    assert all(set(io.decode(s.image)[0]) == set(game.state) for s in game.sent if s.image)
    assert all(len(s.metrics) == len(game.opened.plans[s.row["plan"]].phases) for s in game.sent)
