"""Runs of real step files for the oracles: their files read as plain tensors."""

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from oracles import draws, plain
from torch import Tensor

from fedpipe import io
from fedpipe.config import Study
from fedpipe.data import dataset
from fedpipe.local import Job, fresh, run_jobs
from fedpipe.opened import rows_by_client
from fedpipe.paths import RunPaths, StudyPaths
from fedpipe.types import Tensors

CLOSE = 1e-12
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def local(epochs: int = 1, batch: int = 16, **optimizer: float) -> dict[str, Any]:
    return {"epochs": epochs, "batch": batch, "optimizer": optimizer or SGD}


class Played:
    """A run that went through its steps: its files, read as plain tensors."""

    def __init__(self, paths: RunPaths):
        self.paths, self.run = paths, paths.run
        self.data = dataset.load(paths.data)
        shares = io.read_table(paths.partition)
        self.rows, self.test_rows = rows_by_client(shares, "train"), rows_by_client(shares, "test")

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (self.data.mean, self.data.std))
        return (self.data.x[rows].double() / 255 - mean) / std, self.data.y[rows]

    def batches(self, t: int, client: int, phase: int = 0) -> list[tuple[Tensor, Tensor]]:
        local = self.run.local
        drawn = draws.batches(self.run.seed, t, client, self.rows[client], local.batch, local.epochs, phase)
        return [self.batch(rows) for rows in drawn]

    def cohorts(self) -> list[list[int]]:
        clients = self.run.data.partition.clients
        return [draws.cohort(self.run.seed, t, clients, self.run.cohort) for t in range(self.run.rounds)]

    def state(self, t: int, prefix: str = "model/") -> Tensors:
        tensors = io.read_tensors(self.paths.state(t) / f"server@{t}.safetensors")[0]
        return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    def mlp(self, t: int, prefix: str = "model/") -> plain.Weights:
        return as_list(self.state(t, prefix))

    def samples(self, cohort: Iterable[int]) -> list[int]:
        return [len(self.rows[i]) for i in cohort]


def as_list(state: Tensors) -> plain.Weights:
    """[W1, b1, W2, ...] of the package's MLP."""
    hidden = sorted({n.split(".")[0] for n in state} - {"stem", "head"})
    return [state[f"{u}.1.{kind}"] for u in ("stem", *hidden, "head") for kind in ("weight", "bias")]


def play(root: Path, every: int | None = None, prediction: Path | None = None, until: str = "segment",
         **keys: Any) -> Played:  # fmt: skip
    """Run the steps of a one-method, one-seed study up to a step; steps that are done in `root` are left."""
    study = Study.model_validate({"name": "oracle", "precision": "float64", "device": "cpu", **keys})
    paths = StudyPaths(root, study)
    paths.write_specs()
    (p,) = paths.runs
    for job in run_jobs(p, every or study.rounds):
        if job.step == "evaluate" and until != "evaluate":
            break
        _do(job, prediction)
    return Played(p)


def _do(job: Job, prediction: Path | None) -> None:
    reads = {k: prediction if k == "prediction" and prediction else v for k, v in job.reads.items()}
    if (job.step == "measure" and prediction) or (job.step in ("data", "partition") and fresh(job)):
        return
    importlib.import_module(f"fedpipe.steps.{job.step}").run(**reads, **job.writes)


def apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest difference of any two entries."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
