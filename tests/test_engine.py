"""The engine's own promises: names, mean, draws, the oracle, replies, idle rounds, platforms."""

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import IID, SKEWED, Game, distance, equal, make_run

from fedpipe import methods
from fedpipe.aggregate import check, cut, mean
from fedpipe.errors import FedpipeError
from fedpipe.loop.capture import PROGRAMS
from fedpipe.rng import rng
from fedpipe.route import needed_states
from fedpipe.types import Plan, Tensors, Update, Window, matches, under

ENGINE = Path(methods.__file__).parent.parent


# ------------------------------------------------------------------------------------------------------------- names
def test_engine_names_no_method() -> None:
    names = set(methods.known())
    assert {"fedavg", "fedepth", "scaffold"} <= names
    files = [f for f in ENGINE.rglob("*.py") if f.parent.name != "methods" or f.name == "__init__.py"]
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant):
                assert node.value not in names, f"{file}:{node.lineno} holds the name of a method"
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("fedpipe.methods."), f"{file}:{node.lineno}"
                assert node.module != "fedpipe.methods" or not {a.name for a in node.names} & names
            if isinstance(node, ast.Import):
                assert not [a for a in node.names if a.name.startswith("fedpipe.methods.")], f"{file}:{node.lineno}"


def test_patterns_are_read_in_order() -> None:
    assert matches("model/a.w", ("model/*",))
    assert not matches("model/a.w", ("model/*", "!model/a.*"))
    assert matches("model/a.w", ("model/*", "!model/a.*", "model/a.w"))
    assert not matches("own/c", ())


def test_draws_are_counted_by_purpose() -> None:
    def draw(*args: Any) -> list[float]:
        return rng(*args).random(4).tolist()

    assert draw(1, 2, 3, "a") == draw(1, 2, 3, "a")
    others = [draw(1, 2, 3, "b"), draw(1, 2, 4, "a"), draw(1, 3, 3, "a"), draw(2, 2, 3, "a"), draw(1, None, 3, "a")]
    assert len({tuple(o) for o in [*others, draw(1, 2, 3, "a")]}) == 6


# -------------------------------------------------------------------------------------------------------------- mean
def update(weight: float, tensors: Tensors, index: tuple[Window, ...] = ()) -> Update:
    return Update(0, weight, 1, tensors, index)


def test_mean_is_over_those_who_hold_an_entry() -> None:
    state = {"model/w": torch.arange(6.0), "model/n": torch.tensor(7), "server/c": torch.ones(2)}
    whole = update(1, {"model/w": torch.full((6,), 10.0), "model/n": torch.tensor(9)})
    part = update(3, {"model/w": torch.full((2,), 2.0)}, (Window("model/w", 0, 1, 3),))
    wrapped = update(1, {"model/w": torch.tensor([4.0, 6.0])}, (Window("model/w", 0, 5, 7),))
    masked = update(2, {"model/w": torch.full((6,), 5.0), "mask/model/w": torch.tensor([0, 0, 0, 1, 0, 0])})
    out = mean(state, [part, wrapped])["model/w"].tolist()
    assert out == [6.0, 2.0, 2.0, 3.0, 4.0, 4.0], "entries 3 and 4 are held by nobody"
    out = mean(state, [whole, part, masked])
    assert out["model/w"].tolist() == pytest.approx([10, 4, 4, (10 + 2 * 5) / 3, 10, 10])
    assert out["model/n"] == 7 and out["server/c"].tolist() == [1, 1]
    assert equal(mean(state, []), state)


def test_mean_of_one_is_that_one() -> None:
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mean({"model/w": w * 0}, [update(37.0, {"model/w": w})])["model/w"], w)


def test_windows_in_two_dimensions_that_wrap() -> None:
    w = torch.arange(12.0).reshape(3, 4)
    windows = (Window("model/w", 0, 2, 4), Window("model/w", 1, 3, 5))
    assert cut({"model/w": w}, windows)["model/w"].tolist() == [[11, 8], [3, 0]]
    back = mean({"model/w": w}, [update(1, {"model/w": -torch.ones(2, 2)}, windows)])["model/w"]
    assert (back < 0).nonzero().tolist() == [[0, 0], [0, 3], [2, 0], [2, 3]]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({}, "model/w is missing"),
        ({"model/w": torch.ones(3)}, "model/w has shape (3,), wanted (2,)"),
        ({"model/w": torch.tensor([1.0, float("nan")])}, "model/w holds values that are not finite"),
        ({"model/w": torch.ones(2), "own/c": torch.ones(1)}, "own/c is private"),
        ({"model/w": torch.ones(2), "server/c": torch.ones(1)}, "server/c has shape (1,), wanted (2,)"),
    ],
)
def test_updates_are_checked(sent: Tensors, said: str) -> None:
    state = {"model/w": torch.ones(2), "server/c": torch.ones(2)}
    check({"model/w": torch.ones(2)}, state, Plan(), "update")
    with pytest.raises(FedpipeError) as e:
        check(sent, state, Plan(), "update of client 3, round 1")
    assert said in str(e.value) and str(e.value).startswith("update of client 3, round 1: ")


# ------------------------------------------------------------------------------------------------------------- hooks
MINE = '''
import torch
from dataclasses import replace
from fedpipe.types import Method, Phase, Plan, Train, Mix, under

calls = []

def quarter(grad, at, batch, ctx):
    """The gradient at a quarter of the way back, on the half of the batch that comes first."""
    here = {n: t for n, t in at.items() if n.startswith("model/")}
    x = {n: 0.75 * t for n, t in here.items()}
    assert ctx.client is None
    value = grad.value({**at, **x})
    g = grad({**at, **x})
    return {n: g[n] + 0 * value for n in g}, {}

def noise(gen, at, batch, ctx):
    return {"tmp/e": torch.from_numpy(gen.standard_normal(batch["x"].shape)).to(batch["x"].dtype)}

def noisy(at, batch, ctx):
    calls.append(1)
    z, changed = ctx.forward(at, batch["x"] + at["tmp/e"])
    return ctx.task(z, batch), changed

def counted(at, batch, ctx):
    calls.append(1)
    return ctx.task(ctx.apply(at, batch["x"]), batch)

def idle(grad, at, batch, ctx):
    return {n: 0.001 * t for n, t in at.items() if n.startswith("model/")}, {"tmp/steps": at["tmp/steps"] + 1}

def begin(at, ctx):
    return {**under(at, "in/model/", "model/"), "tmp/steps": torch.zeros(())}

def end(at, ctx):
    return {"steps": at["tmp/steps"]}, {}

# replies: h moves by the mean that the client's own last update went into (Scaffnew's rule, lazily)
def plan(ctx):
    return Plan(keep=("own/*",), reply=("model/*",), weight="one")

def reply_begin(at, ctx):
    model = under(at, "in/model/", "model/")
    seen = sum((t.double().sum() for n, t in sorted(at.items()) if n.startswith("re/")), torch.zeros(()).double())
    return {**model, "own/seen": seen.reshape(1), "own/rounds": at.get("own/rounds", torch.zeros(1)) + 1}

away = Method(direction=quarter)
drawn = Method(draw=noise, loss=noisy)
unasked = Method(begin=begin, loss=counted, direction=idle, end=end)
replies = Method(plan=plan, begin=reply_begin)
leaks = Method(end=lambda at, ctx: ({"own/x": torch.zeros(1)}, {}))
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(MINE)
    return str(file)


def hooks(mine: str) -> Any:
    import sys

    return next(m for m in sys.modules.values() if getattr(m, "__file__", None) == mine)


@pytest.mark.parametrize("record", ["away", "drawn"])
def test_hooks_for_one_client_are_stacked(record: str, mine: str, root: Path) -> None:
    alone = Game(make_run(f"{mine}:{record}", SKEWED, stack=1), root).play()
    stacked = Game(make_run(f"{mine}:{record}", SKEWED, stack=8), root).play()
    plain = Game(make_run("fedavg", SKEWED, stack=1), root).play()
    assert stacked.largest_group > 1 and distance(alone.state, stacked.state) < 1e-5
    assert distance(alone.state, plain.state) > 1e-3, "the hook did nothing"


def test_gradient_elsewhere_is_the_gradient_there(mine: str, root: Path) -> None:
    game = Game(make_run(f"{mine}:away", rounds=1, local={"epochs": 1, "batch": 64, "optimizer": {"lr": 0.1}}), root)
    rt, begin = game.opened.rt, game.state
    chain = replace(rt.ctx(), chain=rt.build())
    sent = game.play().sent[0]
    rows = game.opened.training[sent.row["client"]]
    x = {n: (0.75 * t).requires_grad_() for n, t in begin.items()}
    order = torch.from_numpy(rng(0, 0, sent.row["client"], "train/batches/0").permutation(len(rows)))
    batch = rt.feed.load(rows[order], 40)
    chain.task(chain.apply(x, batch["x"]), batch).backward()  # type: ignore[no-untyped-call]
    from fedpipe.io import decode

    got = decode(sent.image or b"")[0]
    want = {n: begin[n] - 0.1 * x[n].grad for n in begin}  # type: ignore[operator]
    assert distance(got, want) < 1e-6


def test_a_gradient_nobody_asks_for_is_never_computed(mine: str, root: Path) -> None:
    game = Game(make_run(f"{mine}:unasked", stack=1), root)
    seen = hooks(mine).calls
    seen.clear()
    begin = game.state
    game.play(1)
    steps = sum(s.metrics[0]["steps"] for s in game.sent)
    assert len(seen) <= 8 and steps == 36, "once per client, or written down once: not per step"
    method = game.opened.rt.method
    made = [p for k, v in PROGRAMS.known.items() if method.direction in k[1] for p in v]
    assert made and all(p and "_backward" not in p.silent.__doc__ for p in made)
    assert distance(game.state, begin) > 1e-5
    from fedpipe.io import decode

    assert all(float(decode(s.image or b"")[0]["steps"]) == 6 for s in game.sent), "changed names are kept"


def test_replies_are_the_state_my_last_update_made(mine: str, root: Path, tmp_path: Path) -> None:
    run = make_run(f"{mine}:replies", SKEWED, rounds=6, cohort=2)
    game = Game(run, root)
    sums = {0: 0.0}
    last: dict[int, int] = {}

    def keep(world: Any) -> None:
        state = world.states[f"server@{game.t}"]
        sums[game.t] = sum(float(t.double().sum()) for t in state.values())

    longest = 0
    for t in range(6):
        cohort = [r for r in game.trains if r["round"] == t]
        game.play(1, keep)
        for r in cohort:
            c = r["client"]
            assert r["reply"] == (f"server@{last[c] + 1}" if c in last else None)
            assert float(game.world.own(c)["own/seen"]) == pytest.approx(
                sums[last[c] + 1] if c in last else 0.0, abs=1e-6
            )
            longest = max(longest, t - last.get(c, t))
            last[c] = t
        needed = needed_states(game.opened.route, t + 1)
        assert f"server@{t + 1}" in needed and len(needed) <= 1 + sum(r["round"] > t for r in game.trains)
    assert longest > 1, "somebody was away for a round"
    assert needed_states(game.opened.route, 6) == {"server@6"}


def test_private_names_are_refused(mine: str, root: Path) -> None:
    with pytest.raises(FedpipeError, match="own/x is private and must not be sent"):
        Game(make_run(f"{mine}:leaks"), root).play(1)


# ------------------------------------------------------------------------------------------------- rounds, platforms
def test_clients_without_a_plan_sit_out_and_a_round_with_nobody_is_idle(root: Path) -> None:
    keys: dict[str, Any] = {"budgets": {"like_width": {0.25: 5, 1.0: 1}}, "cohort": 1, "rounds": 8}
    game = Game(make_run("fedavg", **keys), root)
    drawn = [int(rng(0, t, None, "cohort").choice(6, 1)[0]) for t in range(8)]
    assert {r["client"] for r in game.trains} == {5} & set(drawn)
    states = [game.state]
    for _ in range(8):
        states.append(game.play(1).state)
    idle = [equal(a, b) for a, b in zip(states, states[1:], strict=False)]
    assert idle == [c != 5 for c in drawn] and True in idle and False in idle


def test_everybody_can_be_measured(root: Path) -> None:
    game = Game(make_run("fedavg", measure="all"), root).play(1)
    assert game.largest_group == 1
    assert [p["client"] for p in game.opened.rounds.peaks] == [0, 1, 2, 3, 4, 5]


def test_another_platform_stops_unless_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("fedavg", rounds=4)
    Game(run, root)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    with pytest.raises(FedpipeError, match=r"platform: state 0 was made on \[.*\], this job runs on \[.*avx2"):
        Game(run, root)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    free = make_run("fedavg", rounds=4, platform="any")
    Game(free, root)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert "avx2" in Game(free, root).opened.meta["platform"]


# ------------------------------------------------------------------------------------------------------------ models
USER_MODEL = """
import torch
from torch import nn

def running(shape, classes):
    n = shape[0] * shape[1] * shape[2]
    return [("stem", nn.Flatten()), ("h1", nn.Sequential(nn.Linear(n, 16), nn.BatchNorm1d(16), nn.Tanh())),
            ("head", nn.Linear(16, classes))]

class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x

def noisy(shape, classes):
    n = shape[0] * shape[1] * shape[2]
    return [("stem", nn.Flatten()), ("h1", nn.Sequential(nn.Linear(n, 16), Noise(), nn.Tanh())),
            ("head", nn.Linear(16, classes))]

def whole(shape, classes):
    n = shape[0] * shape[1] * shape[2]
    return [("stem", nn.Flatten()), ("h1", nn.Sequential(nn.Linear(n, 16), nn.Dropout(0.0), nn.Tanh())),
            ("head", nn.Linear(16, classes))]

def dropping(shape, classes):
    n = shape[0] * shape[1] * shape[2]
    return [("stem", nn.Flatten()), ("h1", nn.Sequential(nn.Linear(n, 16), nn.Dropout(0.5), nn.Tanh())),
            ("head", nn.Linear(16, classes))]
"""


@pytest.fixture(scope="module")
def user_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("model") / "nets.py"
    file.write_text(USER_MODEL)
    return str(file)


def test_running_statistics_are_trained_stacked_and_averaged(user_model: str, root: Path) -> None:
    model = {"name": f"{user_model}:running"}
    alone = Game(make_run("fedavg", model=model, stack=1), root)
    begin = alone.state
    alone.play()
    stacked = Game(make_run("fedavg", model=model, stack=8), root).play()
    assert stacked.largest_group == 6 and distance(alone.state, stacked.state) < 1e-5
    moved = {n for n in begin if not equal({n: begin[n]}, {n: alone.state[n]})}
    assert {"model/h1.1.running_mean", "model/h1.1.running_var"} <= moved
    assert int(alone.state["model/h1.1.num_batches_tracked"]) == 0, "counters are not averaged"


def test_unequal_batches_are_not_stacked_where_rows_influence_each_other(user_model: str, root: Path) -> None:
    game = Game(make_run("fedavg", SKEWED, model={"name": f"{user_model}:running"}, stack=8, rounds=6), root)
    samples = {c: len(rows) for c, rows in game.opened.training.items()}
    groups: dict[tuple[int, int], set[int]] = {}
    for r in game.trains:
        groups.setdefault((r["round"], r["group"]), set()).add(samples[r["client"]])
    assert all(len(s) == 1 for s in groups.values())


def test_layers_that_draw_are_not_stacked_and_repeat(user_model: str, root: Path) -> None:
    run = make_run("fedavg", model={"name": f"{user_model}:noisy"}, stack=8)
    before = torch.get_rng_state()
    first, second = Game(run, root).play(), Game(run, root).play()
    assert first.largest_group == 1 and equal(first.state, second.state)
    assert torch.equal(torch.get_rng_state(), before)
    other = Game(make_run("fedavg", model={"name": f"{user_model}:noisy"}, stack=8, seeds=[1]), root).play()
    assert distance(under(first.state, "model/"), under(other.state, "model/")) > 1e-2


def test_dropout_draws_with_the_step_so_it_is_stacked_and_repeats(user_model: str, root: Path) -> None:
    """Clients of unequal numbers of samples: padded batches drop the same entries of the rows they share."""
    keys: dict[str, Any] = {"model": {"name": f"{user_model}:dropping"}}
    before = torch.get_rng_state()
    stacked, again = (Game(make_run("fedavg", SKEWED, **keys, stack=8), root).play() for _ in range(2))
    alone = Game(make_run("fedavg", SKEWED, **keys, stack=1), root).play()
    assert stacked.largest_group > 1 and equal(stacked.state, again.state)
    assert distance(stacked.state, alone.state) < 1e-5
    assert torch.equal(torch.get_rng_state(), before)
    keys["model"] = {"name": f"{user_model}:whole"}  # the same without dropout
    plain = Game(make_run("fedavg", SKEWED, **keys, stack=1), root).play()
    assert distance(under(alone.state, "model/"), under(plain.state, "model/")) > 1e-2
    other = Game(make_run("fedavg", SKEWED, model={"name": f"{user_model}:dropping"}, stack=8, seeds=[1]), root).play()
    first = stacked
    assert distance(under(first.state, "model/"), under(other.state, "model/")) > 1e-2


def test_learning_rate_follows_the_cosine(root: Path) -> None:
    rt = Game(make_run("fedavg", rounds=4, local={**IID["local"], "schedule": "cosine"}), root).opened.rt
    assert [rt.lr(t) for t in range(4)] == pytest.approx([0.1 * 0.5 * (1 + np.cos(np.pi * t / 4)) for t in range(4)])


# -------------------------------------------------------------------------------------------------------------- CUDA
@pytest.mark.gpu
def test_training_on_cuda(root: Path) -> None:
    """Stacks above one, within rounding of one by one; equal bytes when run twice; the witness within its budget."""
    keys: dict[str, Any] = {"device": "cuda", "budgets": {"like_width": {1.0: 6}}}
    stacked, again = (Game(make_run("fedavg", SKEWED, **keys), root).play() for _ in range(2))
    alone = Game(make_run("fedavg", SKEWED, **keys, stack=1), root).play()
    assert stacked.largest_group > 1 and equal(stacked.state, again.state)
    assert distance(stacked.state, alone.state) < 1e-4
    assert all(p["measured"] <= p["budget"] for p in stacked.opened.rounds.peaks)
