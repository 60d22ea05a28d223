"""Clients that fail: over budget, not finite, raising alone or in a stack; what stops, what is dropped and written."""

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import IID, Game, assigned, equal, make_run

from fedpipe import io
from fedpipe.errors import FedpipeError
from fedpipe.failures import attempt, said
from fedpipe.folding import played
from fedpipe.memory import measure
from fedpipe.paths import RunPaths
from fedpipe.steps import aggregate, segment, train
from fedpipe.types import Method

MINE = '''
import torch
from fedpipe.loop.client import default_begin
from fedpipe.types import Method, Plan

def extra(value, client=2):
    """A hook whose client 2 (or everybody) sends this value."""
    return lambda at, ctx: ({"extra": torch.tensor(value if ctx.client == client or client is None else 0.0)}, {})

def begin(at, ctx):
    return {**default_begin(at, ctx), "own/rounds": at.get("own/rounds", torch.zeros(1)) + 1}

def end(at, ctx):
    if (ctx.client, ctx.round) == (2, 1):
        raise ValueError("no\\nluck")
    return {}, {}

def branch(at, batch, ctx):
    loss = ctx.task(ctx.apply(at, batch["x"]), batch)
    return loss if loss.detach().item() > 0 else loss

infinite = Method(end=extra(float("inf")))
hopeless = Method(end=extra(float("nan"), None))
unlucky = Method(plan=lambda ctx: Plan(keep=("own/*",)), begin=begin, end=end)
unstackable = Method(loss=branch)

def lost(at, ctx):
    bad = (ctx.client, ctx.round) in ((2, 0), (3, 1))
    return {n: t * float("nan") if bad and n.startswith("model/") else t for n, t in default_begin(at, ctx).items()}

diverging = Method(begin=lost)
'''
LINE = r"client 2, round 1: .*mine\.py, line 15: ValueError: no luck"


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(MINE)
    return str(file)


def failed(game: Game) -> list[tuple[int, int]]:
    """(round, client) of all metrics that say so, each client's rows as one."""
    return sorted({(m["round"], m["client"]) for s in game.sent for m in s.metrics if m["failed"]})


def dropped(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on standard error that say of a client that it was dropped."""
    return [line for line in capsys.readouterr().err.splitlines() if "dropped, " in line]


def without(game: Game, again: Game, t: int) -> bool:
    """Whether the state that round t led to is the mean over the clients that did not fail, and of nobody else."""
    others = [s for s in game.sent if s.row["round"] == t and not s.metrics[0]["failed"]]
    return bool(others) and equal(again.opened.rounds.mix(t, again.world, others).states[f"server@{t + 1}"], game.state)


def test_values_that_are_not_finite(mine: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FedpipeError, match="client 2, round 0: extra is not finite after training .*: drop goes on"):
        Game(make_run(f"{mine}:infinite"), root).play(1)
    run = make_run(f"{mine}:infinite", on_client_failure="drop")
    game = Game(run, root).play(1)
    assert failed(game) == [(0, 2)] and without(game, Game(run, root), 0)
    (lost,) = [s for s in game.sent if s.image is None]
    assert all(m["steps"] > 0 and m["loss_last"] > 0 and m["payload_up"] == m["header_up"] == 0 for m in lost.metrics)
    assert dropped(capsys)[0].startswith("fedpipe: client 2, round 0: dropped, extra is not finite after training")


def test_a_value_that_is_not_finite_is_found_after_its_message_is_let_go(
    mine: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(f"{mine}:diverging", on_client_failure="drop", measure="all")
    plain, game = Game(run, root).play(2), Game(run, root)
    capsys.readouterr()
    rounds, trained = game.opened.rounds, list[int]()
    inner = rounds._trained
    monkeypatch.setattr(rounds, "_trained", lambda group, *a: (trained.append(group[0]["round"]), inner(group, *a))[1])
    for t in range(2):
        game.world, sent = played(rounds, t, game.world, rounds.groups(t))
        game.sent, game.t = game.sent + sent, t + 1
        assert rounds.careful
    assert trained == [0] * 12 + [1] * 6, "once more, and from then on each is looked at"
    assert failed(game) == [(0, 2), (1, 3)] and len(dropped(capsys)) == 2
    assert equal(plain.state, game.state) and len(rounds.peaks) == len(plain.opened.rounds.peaks) == 12
    with pytest.raises(FedpipeError, match="client 2, round 0: model/.* is not finite after training"):
        stopped = Game(make_run(f"{mine}:diverging"), root)
        played(stopped.opened.rounds, 0, stopped.world, stopped.opened.rounds.groups(0))


def test_a_round_in_which_everybody_fails_is_an_error(mine: str, root: Path) -> None:
    with pytest.raises(FedpipeError, match="round 0: every client failed"):
        Game(make_run(f"{mine}:hopeless", on_client_failure="drop"), root).play(1)


@pytest.mark.parametrize("stack", [1, 8])
def test_training_that_raises(stack: int, mine: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FedpipeError, match=f"^{LINE}; on_client_failure: drop goes on without it$") as e:
        Game(make_run(f"{mine}:unlucky", stack=stack), root).play(2)
    assert isinstance(e.value.__cause__, ValueError)
    assert not dropped(capsys)
    run = make_run(f"{mine}:unlucky", stack=stack, on_client_failure="drop")
    first, game = Game(run, root).play(1), Game(run, root).play(2)
    (group,) = [g for g in game.opened.rounds.groups(1) if 2 in {r["client"] for r in g}]
    assert (len(group) > 1) == (stack > 1)
    assert failed(game) == [(1, 2)] and without(game, first, 1)
    (lost,) = [s for s in game.sent if s.image is None]
    seen = [{k: m[k] for k in ("steps", "loss_first", "loss_last", "header_up")} for m in lost.metrics]
    assert seen == [{"steps": 0, "loss_first": None, "loss_last": None, "header_up": 0}]
    assert lost.metrics[0]["payload_down"] > 0, "it had received the model"
    (line,) = dropped(capsys)
    assert re.fullmatch(rf"fedpipe: {LINE.replace('1: ', '1: dropped, ', 1)}", line)
    rounds = {c: float(game.world.own(c)["own/rounds"]) for c in range(6)}
    assert rounds == {0: 2, 1: 2, 2: 1, 3: 2, 4: 2, 5: 2} and game.world.owns[2][0] == 0


def test_a_stack_that_fails_though_none_of_its_clients_does(mine: str, root: Path) -> None:
    """The machine's memory, or a hook that cannot be stacked: dropped or not, no client is to blame."""
    who = (
        r"clients (\d, )+\d, round 0: .*mine\.py, line \d+: RuntimeError: .*; each of them trains alone, so lower stack"
    )
    for on in ("stop", "drop"):
        with pytest.raises(FedpipeError, match=who):
            Game(make_run(f"{mine}:unstackable", stack=8, on_client_failure=on), root).play(1)
    Game(make_run(f"{mine}:unstackable", stack=1), root).play(1)


def test_an_interrupt_is_no_failure(root: Path) -> None:
    def interrupt(at: Any, ctx: Any) -> Any:
        raise KeyboardInterrupt

    game = Game(make_run("fedavg", on_client_failure="drop"), root)
    game.opened.rt.method = Method(begin=interrupt)
    with pytest.raises(KeyboardInterrupt):
        game.play(1)


def test_a_caught_exception_frees_the_memory_that_ran_out() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        large = torch.zeros(3)
        made.append(weakref.ref(large))
        raise torch.OutOfMemoryError("3 numbers are too many")

    error = attempt(work)
    assert isinstance(error, torch.OutOfMemoryError) and made[0]() is None
    assert re.fullmatch(r".*test_failures\.py, line \d+: OutOfMemoryError: 3 numbers are too many", said(error))


def test_memory_is_freed_that_an_exceptions_cause_holds() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def train() -> None:
        large = torch.zeros(3)
        made.append(weakref.ref(large))
        raise torch.OutOfMemoryError

    def work() -> None:
        try:
            train()
        except torch.OutOfMemoryError as e:
            raise FedpipeError("over its budget") from e

    assert isinstance(attempt(work), FedpipeError) and made[0]() is None


def test_going_over_the_budget(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    keys: dict[str, Any] = {"budgets": {"like_width": {1.0: 6}}, "stack": 1}
    game = Game(make_run("fedavg", **keys), root)
    (limit,) = {r["budget"] for r in game.trains}
    game.play(1)
    (peak,) = game.opened.rounds.peaks
    assert peak["measured"] <= limit == peak["budget"]
    inner = measure.Peak.__exit__

    def more(self: Any, *error: Any) -> None:
        inner(self, *error)
        self.bytes += limit

    monkeypatch.setattr(measure.Peak, "__exit__", more)
    said = r"client \d, round 0: measured peak .* of phase 1 of 1 is over its budget of"
    with pytest.raises(FedpipeError, match=said):
        Game(make_run("fedavg", **keys), root).play(1)
    run = make_run("fedavg", **keys, on_client_failure="drop")
    game = Game(run, root).play(1)
    assert failed(game) == [(0, peak["client"])] and without(game, Game(run, root), 0)
    (over,) = game.opened.rounds.peaks
    assert over == {**peak, "measured": peak["measured"] + limit, "resident": over["resident"]}
    assert " MiB of phase 1 of 1 is over its budget of " in dropped(capsys)[0]


def in_jobs(p: RunPaths, run: Path, jobs: int) -> None:
    """The rounds of a run as the workflow cuts them: train jobs, then one aggregate a round, in folders of `run`."""
    shared = {"run": p.spec, "data": p.data, "partition": p.partition, "plans": p.plans, "route": p.route}
    state, own = p.state(0), p.own(0)
    for t in range(p.run.rounds):
        trained = [run / f"train{t}" / str(j) for j in range(jobs)]
        for j, out in enumerate(trained):
            train.run(**shared, state=state, own=own, out=out, job=j, jobs=jobs)
        new = {"next_state": run / f"state{t + 1}", "next_own": run / f"own{t + 1}"}
        aggregate.run(**shared, state=state, own=own, trained=trained, **new, **tables(run, str(t)))
        state, own = new["next_state"], new["next_own"]


def tables(folder: Path, name: str) -> dict[str, Path]:
    kinds = {"rounds": "", "curve": ".curve", "times": ".obs", "peaks": ".peaks.obs"}
    return {k: folder / f"{name}{suffix}.parquet" for k, suffix in kinds.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_jobs_drop_the_same_client_to_the_same_bytes(mine: str, root: Path, tmp_path: Path) -> None:
    run = make_run(f"{mine}:unlucky", stack=4, on_client_failure="drop")
    p, end = assigned(run, root), IID["rounds"]
    shared = {"run": p.spec, "data": p.data, "partition": p.partition, "plans": p.plans, "route": p.route}
    new = {"next_state": tmp_path / "state", "next_own": tmp_path / "own", **tables(tmp_path, "whole")}
    segment.run(**shared, state=p.state(0), own=p.own(0), last=end, **new)
    in_jobs(p, tmp_path, 2)
    assert contents(tmp_path / "state") == contents(tmp_path / f"state{end}") != {}
    assert contents(tmp_path / "own") == contents(tmp_path / f"own{end}")
    whole = io.read_table(tmp_path / "whole.parquet").to_pylist()
    assert whole == [m for t in range(end) for m in io.read_table(tmp_path / f"{t}.parquet").to_pylist()]
    assert [(m["round"], m["client"], m["loss_last"]) for m in whole if m["failed"]] == [(1, 2, None)]
