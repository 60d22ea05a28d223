"""Captured steps replayed: the bookkeeping around graphs by ones of the CPU, and on a card by CUDA's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import IID, SKEWED, Game, distance, equal, make_run
from torch import Tensor

from fedpipe import runtime
from fedpipe.loop import capture
from fedpipe.loop.capture import Programs
from fedpipe.loop.replay import Replays

FEDEPTH: dict[str, Any] = {"model": {"name": "preresnet20", "norm": "batch"}, "budgets": {"like_width": {"1/2": 6}}}
MOMENTUM = {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}}


class Noted:
    """A graph of the CPU, as a card's is: recording does nothing yet, and results lie where the last ones lay."""

    made: list["Noted"] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.replays, self.out = 0, list[Tensor]()
        self.made.append(self)

    def record(self, work: Callable[[], list[Tensor]]) -> None:
        self.work = work

    def replay(self) -> list[Tensor]:
        self.replays += 1
        now = self.work()
        if not self.out:
            self.out = [t.clone() for t in now]
        for mine, t in zip(self.out, now, strict=True):
            mine.copy_(t)
        return self.out


class Refused(Noted):
    def record(self, work: Callable[[], list[Tensor]]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "PATIENCE", 0)


def played(method: Any, root: Path, graph: Callable[[], Any] | None, base: dict[str, Any], **keys: Any) -> Game:
    found = Replays(graph) if graph else None
    with pytest.MonkeyPatch.context() as m:
        m.setattr(runtime, "replays", lambda device: found)
        Noted.made = []
        return Game(make_run(method, base, **keys), root).play()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("method", "base", "keys"),
    [
        ("fedavg", SKEWED, {"stack": 4}),  # unequal steps: clients that have finished are put back
        ("fedavg", SKEWED, {"stack": 1}),
        ("scaffold", IID, {"stack": 3, "local": {**IID["local"], **MOMENTUM}}),
        ("fedprox", IID, {"stack": 1, "local": {**IID["local"], "optimizer": {"name": "adamw", "lr": 0.01}}}),
        ("fedavg", IID, {"stack": 3, "local": {**IID["local"], "schedule": "cosine"}}),
        ("fedepth", IID, {**FEDEPTH, "stack": 3, "local": {**IID["local"], **MOMENTUM, "epochs": 1}}),
    ],
)  # fmt: skip
def test_what_is_replayed_has_the_same_bits(method: str, base: dict[str, Any], keys: Any, tmp_path: Path) -> None:
    plain = played(method, tmp_path, None, base, **keys)
    assert not Noted.made
    got = played(method, tmp_path, Noted, base, **keys)
    again = sum(g.replays for g in Noted.made)
    assert again > 3 and len(Noted.made) > 0 and equal(got.state, plain.state)
    assert [s.metrics for s in got.sent] == [s.metrics for s in plain.sent]
    rounds = got.opened.run.rounds
    if "cosine" in str(keys):  # a graph holds the step size: one is recorded for each
        assert len(Noted.made) >= rounds


@pytest.mark.usefixtures("eager")
def test_a_step_that_cannot_be_recorded_is_run(tmp_path: Path) -> None:
    got = played("fedavg", tmp_path, Refused, IID, stack=3)
    assert Noted.made and equal(got.state, played("fedavg", tmp_path, None, IID, stack=3).state)


def test_a_client_that_is_measured_is_not_replayed(tmp_path: Path) -> None:
    played("fedavg", tmp_path, Noted, IID, stack=1, measure="all")
    assert not Noted.made


@pytest.mark.gpu
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("method", ["fedavg", "fedepth"])
def test_cuda_graphs_give_the_bits_of_the_same_launches(method: str, tmp_path: Path) -> None:
    keys = {**FEDEPTH, "device": "cuda", "stack": 3, "local": {**IID["local"], **MOMENTUM, "epochs": 2}}
    made = runtime.replays(torch.device("cuda"))
    assert made is not None
    got = Game(make_run(method, IID, **keys), tmp_path).play()
    recorded = [r for a in made.arenas.values() for r in a.known.values()]
    assert recorded and all(r is not None for r in recorded) and any(r.given for r in recorded if r)
    assert equal(got.state, played(method, tmp_path, None, IID, **keys).state)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Programs, "find", lambda *what: None)
        assert distance(got.state, played(method, tmp_path, None, IID, **keys).state) < 1e-3
