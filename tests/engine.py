"""Runs opened in memory for tests: the real step files up to `assign`, then rounds one by one."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpipe.config import Run, Study
from fedpipe.local import fresh, run_jobs
from fedpipe.opened import Opened
from fedpipe.paths import RunPaths, StudyPaths
from fedpipe.rounds import Rows, Sent, World
from fedpipe.states import read_world
from fedpipe.types import Tensors

IID: dict[str, Any] = {
    "name": "battery",
    "data": {"name": "digits", "rows": 240, "partition": {"kind": "iid", "clients": 6}},
    "model": {"name": "mlp", "hidden": [16, 16, 16]},
    "rounds": 3,
    "cohort": 6,
    "local": {"epochs": 2, "batch": 16, "optimizer": {"lr": 0.1}},
}
SKEWED: dict[str, Any] = IID | {
    "data": {"name": "digits", "rows": 240, "partition": {"kind": "dirichlet", "alpha": 0.5, "clients": 6}},
    "cohort": 4,
}


def make_run(method: str | dict[str, Any], base: dict[str, Any] = IID, **keys: Any) -> Run:
    return Study.model_validate({**base, **keys, "methods": [method]}).runs()[0]


def assigned(run: Run, root: Path) -> RunPaths:
    """Run the steps of a run up to `assign`, where they are not done."""
    study = Study.model_validate(
        {**run.model_dump(exclude={"method", "seed", "select", "selection"}), "name": "t", "methods": [run.method]}
    )
    paths = StudyPaths(root, study.model_copy(update={"seeds": [run.seed]}))
    paths.write_specs()
    (p,) = paths.runs
    for job in run_jobs(p, run.rounds):
        if job.step == "segment":
            break
        if not fresh(job):
            importlib.import_module(f"fedpipe.steps.{job.step}").run(**job.reads, **job.writes)
    return p


class Game:
    """A run played in memory: `play(n)` trains and mixes n rounds."""

    def __init__(self, run: Run, root: Path):
        self.paths = assigned(run, root)
        p = self.paths
        self.opened = Opened(run, p.data, p.partition, p.plans, p.route)
        self.world, self.t = read_world(p.state(0), p.own(0))
        self.sent: list[Sent] = []

    def play(self, rounds: int | None = None, watch: Callable[[World], None] | None = None) -> "Game":
        for _ in range(self.opened.run.rounds - self.t if rounds is None else rounds):
            sent = self.opened.rounds.train(self.t, self.world, self.opened.rounds.groups(self.t))
            self.sent += sent
            self.world = self.opened.rounds.mix(self.t, self.world, sent)
            self.t += 1
            if watch:
                watch(self.world)
        return self

    @property
    def state(self) -> Tensors:
        return self.world.states[f"server@{self.t}"]

    @property
    def trains(self) -> Rows:
        return [r for r in self.opened.route if r["kind"] == "train"]

    @property
    def largest_group(self) -> int:
        members = [(r["round"], r["group"]) for r in self.trains]
        return max(members.count(m) for m in members)


def distance(a: Tensors, b: Tensors) -> float:
    """Largest absolute difference over all names, which must agree."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(bool((a[n] == b[n]).all()) for n in a)
