"""The same round by the published code's way and by fedpipe: four clients, a budget each, images of noise."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import published
import torch
from torch import Tensor

from fedpipe.config import Study
from fedpipe.data.dataset import Dataset
from fedpipe.memory.keep import keeping
from fedpipe.runtime import Runtime
from fedpipe.types import Plan, Row, Tensors, Update

SHAPE, CLASSES = (3, 32, 32), 10
RATIOS = (1 / 6, 1 / 3, 1 / 2, 1.0)
SIDES = ("published", "fixed", "redraw")
Losses = list[tuple[float, float]]  # first and last of each phase


@dataclass(frozen=True)
class Job:
    """Samples of a client, epochs of a phase, samples of a batch."""

    samples: int
    epochs: int
    batch: int = 128
    precision: str = "float32"

    def images(self) -> Dataset:
        """The clients' rows, one client's after another's."""
        gen = torch.Generator().manual_seed(0)
        count = self.samples * len(RATIOS)
        x = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=gen)
        y = torch.randint(0, CLASSES, (count,), generator=gen)
        names = tuple(map(str, range(CLASSES)))
        return Dataset(x, y, np.zeros(count, dtype=np.bool_), SHAPE, CLASSES, names, (0.5,) * 3, (0.25,) * 3)


class Ours:
    """fedpipe in process, with the study's `batches`."""

    def __init__(self, job: Job, batches: str) -> None:
        study: dict[str, Any] = {
            "name": "fedepth",
            "data": {"name": "digits", "partition": {"kind": "iid", "clients": len(RATIOS)}},
            "model": {"name": "preresnet20"},
            "methods": [{"fedepth": {"blocks": "paper"}}],
            "rounds": 1,
            "cohort": len(RATIOS),
            "threads": 1,
            "device": "cpu",
            "precision": job.precision,
            "local": {
                "batch": job.batch,
                "epochs": job.epochs,
                "batches": batches,
                "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
            },
        }
        (run,) = Study.model_validate(study).runs()
        self.rt, self.job = Runtime(run, job.images()), job
        self.state = self.rt.state0
        self.plans = [self._plan(ratio) for ratio in RATIOS]

    def _plan(self, ratio: float) -> Plan:
        assert self.rt.method.plan is not None
        row = Row(budget=None, samples=self.job.samples, ratio=ratio)  # published blocks take more than their budgets
        plan = self.rt.method.plan(self.rt.plan_ctx(row))
        assert plan is not None
        return keeping(self.rt, self.rt.levelled(plan), row, row.samples)

    def client(self, k: int) -> Any:
        rows = torch.arange(self.job.samples) + k * self.job.samples
        ctx = self.rt.ctx(client=k, samples=self.job.samples)
        return self.rt.client(ctx, self.rt.received(self.plans[k], self.state), rows)

    def train(self, k: int) -> tuple[Tensors, Losses]:
        (result,) = self.rt.loop().train([self.client(k)], self.plans[k])
        return result.sent, [(float(first), float(last)) for _, first, last in result.phases]

    def mean(self, sent: list[Tensors]) -> Tensors:
        updates = (Update(k, self.job.samples, self.job.samples, t, ()) for k, t in enumerate(sent))
        return self.rt.ctx(role="server").mean(self.state, updates)


class Published:
    """The published code's way, from the same state 0. drawn: whose batches it takes instead of drawing its own;
    layout: of images and filters, in the published code that of torch's default."""

    def __init__(
        self, job: Job, drawn: "Ours | None" = None, layout: torch.memory_format = torch.contiguous_format
    ) -> None:
        torch.set_num_threads(1)
        self.job, self.drawn = job, drawn
        data, dtype = job.images(), getattr(torch, job.precision)
        self.x, self.y = data.batch(torch.arange(len(data.y)), dtype)
        self.x = self.x.contiguous(memory_format=layout)
        self.net = published.PreResNet20().to(dtype=dtype, memory_format=layout)
        state = (drawn or Ours(job, "redraw")).state
        self.state = {n.removeprefix("model/"): t.to(dtype) for n, t in state.items()}

    def train(self, k: int) -> tuple[Tensors, Losses]:
        part = slice(k * self.job.samples, (k + 1) * self.job.samples)
        self.net.load_state_dict(self.state)
        batches = published.drawn(self.job.samples, self.job.batch, self.job.epochs)
        if self.drawn:
            batches = self._batches(k)
        losses = published.train(self.net, self.x[part], self.y[part], published.BLOCKS[k], batches)
        return {n: t.clone() for n, t in self.net.state_dict().items()}, losses

    def _batches(self, k: int) -> published.Batches:
        assert self.drawn is not None
        client, plan = self.drawn.client(k), self.drawn.plans[k]

        def batches(phase: int) -> Iterator[Tensor]:
            return (torch.as_tensor(rows) - k * self.job.samples for rows in client.batches(plan.phases[phase], phase))

        return batches

    def mean(self, sent: list[Tensors]) -> Tensors:
        return published.average(sent, [self.job.samples] * len(sent))


def opened(side: str, job: Job) -> Ours | Published:
    return Published(job) if side == "published" else Ours(job, side)


def timed(side: Ours | Published) -> list[float]:
    """CPU-seconds of one round: of each client, and of the mean."""
    sent, marks = [], [time.process_time()]
    for k in range(len(RATIOS)):
        sent.append(side.train(k)[0])
        marks.append(time.process_time())
    side.mean(sent)
    marks.append(time.process_time())
    return [b - a for a, b in zip(marks, marks[1:], strict=False)]
