"""A run opened for work: its method, models, data and state 0, and the training loop made from them."""

import math
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpipe import machine, methods
from fedpipe.aggregate import cut
from fedpipe.config import Run
from fedpipe.context import Ctx
from fedpipe.data.dataset import Dataset
from fedpipe.errors import FedpipeError
from fedpipe.feed import Feed
from fedpipe.io import canonical
from fedpipe.loop.capture import programs
from fedpipe.loop.client import Client, Loop, Probe, batch_rows, fixed_batches
from fedpipe.loop.replay import replays
from fedpipe.memory.choose import Chooser
from fedpipe.memory.predictor import Predictor
from fedpipe.models import build as models
from fedpipe.models import traits, weights
from fedpipe.models.chain import Chain
from fedpipe.models.statistics import Statistics
from fedpipe.planning import PlanCtx
from fedpipe.recompute import Policy
from fedpipe.records import changed
from fedpipe.rng import key, rng
from fedpipe.seeding import seeded
from fedpipe.types import Method, Phase, Plan, Row, Tensors, Window, matches

Settings = tuple[tuple[str, Any], ...]  # keywords a client's model is built with
CACHE = 3 << 19  # bytes of parameters a stack on a CPU may have


class Runtime:
    """Everything a step needs of a run, made once per process. Expensive parts are made when first asked for."""

    def __init__(self, run: Run, data: Dataset, method: Method | None = None):
        machine.prepare(run)
        self.run, self.data = run, data
        self.method = method or methods.load(run.method)
        self.device = torch.device(machine.device(run))
        self.dtype = torch.float64 if run.precision == "float64" else torch.float32
        self.feed = Feed(run.local.loss, data, self.device, self.dtype)
        self.programs = programs(run.compile)
        self.predictor, self.chooser = Predictor(self), Chooser(self)
        self._built: dict[Settings, Chain] = {}
        self._layouts: dict[Hashable, torch.memory_format] = {}
        self.statistics = Statistics(self.build()) if run.evaluate.norm == "train" else None
        self._checked: set[tuple[Settings, Policy]] = set()

    def build(self, settings: Settings = ()) -> Chain:
        """The client's model built with these keywords; of its values only those of the full model are ever used."""
        if settings not in self._built:
            self._built[settings] = self._build(settings)
        return self._built[settings]

    def _build(self, settings: Settings) -> Chain:
        chain, run, data = self._drawn("init", settings), self.run, self.data
        what = canonical(
            [run.model.model_dump(mode="json"), self.method.built, settings, data.shape, data.classes, run.precision]
        )
        chain.key = what, str(self.device), models.builder(run.model.name)
        return chain.to(device=self.device)

    def _drawn(self, purpose: str, settings: Settings = ()) -> Chain:
        """The model on the CPU, its values drawn for a purpose."""
        with seeded(key(self.run.seed, None, None, purpose) % 2**63):
            words = {**self.method.built, **dict(settings)}
            return models.load(self.run.model, self.data.shape, self.data.classes, **words).to(dtype=self.dtype)

    def _fresh(self, purpose: str) -> Tensors:
        return {n: t.detach() for n, t in self._drawn(f"init/{purpose}").state_dict().items()}

    def chain(self, plan: Plan) -> Chain:
        return self.build(plan.model)

    @cached_property
    def state0(self) -> Tensors:
        return self.first_state()

    def first_state(self) -> Tensors:
        """State 0: `model/*` drawn from the seed, and what the method's `init` adds. States live on the CPU."""
        model = {f"model/{n}": t.detach().cpu().clone() for n, t in self.build().state_dict().items()}
        if self.run.model.weights:
            model = weights.taken(model, self.build(), Path(self.run.model.weights))
        ctx = replace(self.ctx(role="server"), chain=self.build(), fresh=self._fresh)
        state = self.method.init(model, ctx) if self.method.init else model
        return dict(sorted(state.items()))  # one order of names, in memory as in files

    def windows(self, settings: Settings) -> tuple[Window, ...]:
        return models.windows(self.build(), self.build(settings))

    def ctx(self, round: int = 0, client: int | None = None, role: str = "train", samples: int = 0) -> Ctx:
        return Ctx(
            h=self.method.h,
            seed=self.run.seed,
            clients=self.run.data.partition.clients,
            classes=self.data.classes,
            rounds=self.run.rounds,
            round=round,
            client=client,
            role=role,
            lr=self.lr(round),
            samples=samples,
            aggregation=self.run.kernel("aggregate"),
            norm=self.run.kernel("norm"),
            loss=self.run.local.loss,
            half=torch.bfloat16 if self.run.precision == "bfloat16" else None,
        )

    def levelled(self, plan: Plan) -> Plan:
        """The plan, with the study's recomputation and steps in phases that name none. FedpipeError where the model
        cannot."""
        local = self.run.local
        levels, ranges = tuple(local.levels.items()), tuple(local.again)
        phases = tuple(p if p.levels or p.again else replace(p, levels=levels, again=ranges) for p in plan.phases)
        if local.steps:
            each, more = divmod(local.steps, len(phases))
            phases = tuple(p if p.epochs or p.steps else replace(p, steps=max(1, each + (i < more)))
                           for i, p in enumerate(phases))  # fmt: skip
        for p in phases:
            self._check(plan.model, Policy(p.levels, p.again))
        return replace(plan, phases=phases)

    def _check(self, settings: Settings, policy: Policy) -> None:
        if (settings, policy) in self._checked:
            return
        try:
            traits.check(self.build(settings), policy)
        except ValueError as e:
            raise FedpipeError(f"model {self.run.model.name}: {e}") from None
        self._checked.add((settings, policy))

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
            scenario=self.run.budgets.scenario,
        )

    @cached_property
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

    @property
    def evaluated_at_once(self) -> int:
        """Rows of a batch of evaluation: a rule of shapes and device, as it decides the order of the loss's sum. More
        rows of maps leave a CPU's cache: they take memory and no less time. Where rows of a batch influence each other
        their number is none of a machine's business."""
        maps = self.device.type == "cpu" and traits.has_conv(self.build()) and not traits.batch_coupled(self.build())
        return self.run.evaluate.batch or (32 if maps else 100)

    def stack_key(self, samples: int, plan: Plan) -> int:
        """Clients of equal keys may be stacked: equal samples where rows of a batch influence each other (padding
        would count), else about equal numbers of batches."""
        if traits.batch_coupled(self.chain(plan)):
            return samples
        return (-(-samples // self.run.local.batch)).bit_length()

    def filled(self, plan: Plan, round: int = 0, client: int = 0) -> Plan:
        """The plan of one client in one round: with the method's words in the patterns of what it receives."""
        if not self.method.fill:
            return plan
        words = self.method.fill(self.ctx(round, client))
        return replace(plan, down=tuple(p.format_map(words) for p in plan.down))

    def received(self, plan: Plan, state: Tensors) -> Tensors:
        """What a client of a filled plan starts from: names it receives or has fixed, as `in/*`, cut to its part."""
        held = {n: t for n, t in state.items() if matches(n, plan.down) or matches(n, plan.fixed)}
        return {f"in/{n}": t for n, t in cut(held, plan.index).items()}

    def moved(self, tensors: Tensors) -> Tensors:
        """Tensors on the device that trains."""
        return tensors if self.device.type == "cpu" else {n: t.to(self.device) for n, t in tensors.items()}

    def loop(self, probe: Probe | None = None) -> Loop:
        unprobed: Probe = lambda index, held: nullcontext()  # noqa: E731
        return Loop(
            self.method,
            self.run.local,
            self.chain,
            probe or unprobed,
            self.run.kernel("step"),
            self.programs,
            self.layout,
            None if probe else replays(self.device),  # a graph holds memory of its own, and no client's
            patient=probe is None and not self.run.budgets.limits(self.run.data.partition.clients),
        )

    def client(self, ctx: Ctx, at: Tensors, rows: Tensor) -> Client:
        """A client of the loop whose training rows are `rows` [n] of the data."""
        seed, t, i = self.run.seed, ctx.round, ctx.client

        def batches(phase: Phase, index: int) -> list[NDArray[np.int64]]:
            gen, local = rng(seed, t, i, f"{ctx.role}/batches/{index}"), self.run.local
            if local.batches == "redraw":
                return batch_rows(phase, rows.numpy(), gen, local.batch, local.epochs)
            once = rng(seed, t, i, f"{ctx.role}/batches").permutation(len(rows))
            return fixed_batches(phase, rows.numpy()[once], gen, local.batch, local.epochs)

        mine = ctx
        if (ctx.role, ctx.samples) != ("train", len(rows)):
            mine = changed(mine, role="train", samples=len(rows))
        if self.method.end:
            mine = changed(mine, labels=self.feed.labels(rows))
        return Client(
            ctx=mine,
            at=self.moved(at),
            batches=batches,
            load=self.feed.load,
            load_stack=self.feed.load_stack,
            noise=lambda index, step: rng(seed, t, i, f"{ctx.role}/draw/{index}/{step}"),
            seed=key(seed, t, i, f"{ctx.role}/layers") % 2**63,
            always=self.feed.always(rows),
        )

    def layout(self, chain: Chain) -> torch.memory_format:
        """How images and filters lie: channels last on a CPU that trains one client after another, where convolutions
        are faster so. A rule of shapes and device, as the layout decides bits."""
        if chain.key not in self._layouts:
            last = self.device.type == "cpu" and self.stack_size == 1 and traits.channels_last(chain)
            self._layouts[chain.key] = torch.channels_last if last else torch.contiguous_format
        return self._layouts[chain.key]
