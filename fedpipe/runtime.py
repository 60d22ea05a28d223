"""A run opened for work: its method, models, data and state 0, and the training loop made from them."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from fedpipe import machine, methods
from fedpipe.aggregate import cut
from fedpipe.client import Client, Loop, Probe, batch_rows
from fedpipe.config import Run
from fedpipe.context import Ctx, PlanCtx
from fedpipe.data.dataset import Dataset
from fedpipe.errors import FedpipeError
from fedpipe.memory.choose import Chooser
from fedpipe.memory.predictor import Predictor
from fedpipe.models import chain as models
from fedpipe.models import traits
from fedpipe.recompute import Policy
from fedpipe.rng import key, rng
from fedpipe.seeding import seeded
from fedpipe.types import Batch, Method, Phase, Plan, Row, Tensors, Window, select

CACHE = 1 << 20  # bytes of parameters a stack on a CPU may have


class Runtime:
    """Everything a step needs of a run, made once per process. Expensive parts are made when first asked for."""

    def __init__(self, run: Run, data: Dataset, method: Method | None = None):
        machine.prepare(run)
        self.run, self.data = run, data
        self.method = method or methods.load(run.method)
        self.device = torch.device(machine.device(run))
        self.dtype = getattr(torch, run.precision)
        self.predictor, self.chooser = Predictor(self), Chooser(self)

    @cache  # noqa: B019 (a Runtime lives as long as its process)
    def build(self, settings: tuple[tuple[str, Any], ...] = ()) -> models.Chain:
        """The client's model built with these keywords; of its values only those of the full model are ever used."""
        with seeded(key(self.run.seed, None, None, "init") % 2**63):
            chain = models.load(self.run.model, self.data.shape, self.data.classes, **dict(settings))
        return chain.to(dtype=self.dtype, device=self.device)

    def chain(self, plan: Plan) -> models.Chain:
        return self.build(plan.model)

    @cached_property
    def state0(self) -> Tensors:
        """State 0: `model/*` drawn from the seed, and what the method's `init` adds. States live on the CPU."""
        model = {f"model/{n}": t.detach().cpu().clone() for n, t in self.build().state_dict().items()}
        state = self.method.init(model, self.ctx(role="server")) if self.method.init else model
        return dict(sorted(state.items()))  # one order of names, in memory as in files

    @cache  # noqa: B019
    def windows(self, settings: tuple[tuple[str, Any], ...]) -> tuple[Window, ...]:
        return models.windows(self.build(), self.build(settings))

    def ctx(self, round: int = 0, client: int | None = None, role: str = "train", samples: int = 0) -> Ctx:
        return Ctx(
            h=self.method.h,
            seed=self.run.seed,
            clients=self.run.data.partition.clients,
            classes=self.data.classes,
            round=round,
            client=client,
            role=role,
            lr=self.lr(round),
            samples=samples,
            aggregation=self.run.kernel("aggregate"),
            norm=self.run.kernel("norm"),
        )

    def levelled(self, plan: Plan) -> Plan:
        """The plan, with the study's recomputation in phases that name none. FedpipeError where the model cannot."""
        local = self.run.local
        levels, ranges = tuple(local.levels.items()), tuple(local.again)
        phases = tuple(p if p.levels or p.again else replace(p, levels=levels, again=ranges) for p in plan.phases)
        for p in phases:
            self._check(plan.model, Policy(p.levels, p.again))
        return replace(plan, phases=phases)

    @cache  # noqa: B019
    def _check(self, settings: tuple[tuple[str, Any], ...], policy: Policy) -> None:
        try:
            traits.check(self.build(settings), policy)
        except ValueError as e:
            raise FedpipeError(f"model {self.run.model.name}: {e}") from None

    def lr(self, round: int) -> float:
        """Learning rate of a round: constant, or cosine to 0 over the run's rounds."""
        spec = self.run.local
        if spec.schedule == "constant":
            return spec.optimizer.lr
        return spec.optimizer.lr * 0.5 * (1 + math.cos(math.pi * round / self.run.rounds))

    def plan_ctx(self, row: Row, round: int | None = None) -> PlanCtx:
        return PlanCtx(
            row=row,
            h=self.method.h,
            local=self.run.local,
            rounds=self.run.rounds,
            names=self.build().names,
            choose=self.chooser,
            window=lambda build: self.windows(tuple(build.items())),
            margin=self.run.margin,
            at_round=round,
        )

    @property
    def stack_size(self) -> int:
        """Most clients in one stack: a rule of shapes and device, as stacks decide bits (never of a stopwatch).

        Convolutions of many models are slower stacked on a CPU, and stacks that leave its cache are slower than one
        client after another; layers that draw by themselves cannot be stacked at all.
        """
        chain = self.build()
        if self.run.measure == "all" or traits.drawing(chain):
            return 1
        if self.run.stack != "auto":
            return self.run.stack
        if self.device.type == "cuda":
            return 32
        size = sum(t.numel() * t.element_size() for t in chain.state_dict().values())
        return 1 if traits.has_conv(chain) else max(1, min(32, CACHE // size))

    def stack_key(self, samples: int, plan: Plan) -> int:
        """Clients of equal keys may be stacked: equal samples where rows of a batch influence each other (padding
        would count), else about equal numbers of batches."""
        if traits.batch_coupled(self.chain(plan)):
            return samples
        return (-(-samples // self.run.local.batch)).bit_length()

    def received(self, plan: Plan, state: Tensors) -> Tensors:
        """What a client of a plan starts from: names it receives or has fixed, as `in/*`, cut to its part."""
        return {f"in/{n}": t for n, t in cut(select(state, (*plan.down, *plan.fixed)), plan.index).items()}

    def moved(self, tensors: Tensors) -> Tensors:
        """Tensors on the device that trains."""
        return {n: t.to(self.device) for n, t in tensors.items()}

    def loop(self, probe: Probe | None = None) -> Loop:
        unprobed: Probe = lambda index, held: nullcontext()  # noqa: E731
        return Loop(self.method, self.run.local, self.chain, probe or unprobed, self.run.kernel("step"))

    def client(self, ctx: Ctx, at: Tensors, rows: Tensor) -> Client:
        """A client of the loop whose training rows are `rows` [n] of the data."""
        seed, t, i = self.run.seed, ctx.round, ctx.client

        def batches(phase: Phase, index: int) -> list[Tensor]:
            gen = rng(seed, t, i, f"{ctx.role}/batches/{index}")
            return batch_rows(phase, rows, gen, self.run.local.batch, self.run.local.epochs)

        return Client(
            ctx=replace(ctx, role="train", samples=len(rows)),
            at=self.moved(at),
            batches=batches,
            load=self.load,
            noise=lambda index, step: rng(seed, t, i, f"{ctx.role}/draw/{index}/{step}"),
            seed=key(seed, t, i, f"{ctx.role}/layers") % 2**63,
        )

    def load(self, rows: Tensor, size: int) -> Batch:
        """Rows as a batch: x, y and weights that sum to 1; padded to `size` with rows of weight 0."""
        n = len(rows)
        w = torch.zeros(size, dtype=self.dtype)
        w[:n] = 1 / n
        x, y = self.data.batch(torch.cat([rows, rows[:1].expand(size - n)]) if size > n else rows, self.dtype)
        return {k: v.to(self.device) for k, v in {"x": x, "y": y, "w": w}.items()}
