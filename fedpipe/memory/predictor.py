"""Predicted bytes of plans: the real training loop of the method, run under fake tensors."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from fedpipe.loop.client import Client
from fedpipe.memory.parts import KINDS, Parts
from fedpipe.memory.predict import Span, Trace
from fedpipe.memory.stretch import Ranges
from fedpipe.plans import key
from fedpipe.types import Batch, Phase, Plan, Tensors

if TYPE_CHECKING:
    from fedpipe.runtime import Runtime

STEPS = 2  # the second step holds the optimizer's state


class Predictor:
    """Peak bytes of each phase of a plan for a client with full batches. Phases are traced once and remembered."""

    def __init__(self, runtime: "Runtime"):
        self.runtime = runtime
        self.known: dict[str, Parts] = {}
        self.ranges: Ranges = {}

    def peaks(self, plan: Plan) -> list[int]:
        return [p.peak for p in self.parts(plan)]

    def parts(self, plan: Plan) -> list[Parts]:
        """What the peak of each phase is made of."""
        plan, out, before = self.runtime.levelled(plan), list[Parts](), 0
        for phase in plan.phases:
            parts, now = self._phase(replace(plan, phases=(phase,))), self.kept_bytes(plan, phase)
            traced = self.kept_bytes(plan, replace(phase, kept=self.runtime.run.local.batch))
            # what the phase before has kept is given up batch by batch
            out.append(replace(parts, features=max(0, max(now, before) - traced)))
            before = now
        return out

    def kept_bytes(self, plan: Plan, phase: Phase) -> int:
        """Bytes of the batches that a phase keeps: x, y and w of its samples."""
        if phase.since is None:
            return 0
        item, shape = self.runtime.dtype.itemsize, self.runtime.chain(plan).shapes[phase.since]
        return phase.kept * ((math.prod(shape) + 1) * item + 8)

    def remember(self, predictions: pa.Table) -> dict[float, int]:
        """Take the peaks of `prediction.parquet` as known; returns the bytes of the widths budgets are named after."""
        rows = predictions.to_pylist()
        self.known |= {r["candidate"]: Parts(**{k: r[k] for k in KINDS}) for r in rows if r["kind"] == "candidate"}
        for r in (r for r in rows if r["kind"] == "range"):
            self.ranges.setdefault((r["first"], r["last"]), {})[r["level"]] = r["peak"]
        return {r["width"]: r["peak"] for r in rows if r["kind"] == "budget"}

    def _phase(self, plan: Plan) -> Parts:
        name = candidate(plan)
        if name not in self.known:
            self.known[name] = self._trace(plan)
        return self.known[name]

    def _trace(self, plan: Plan) -> Parts:
        rt = self.runtime
        size, shape = rt.run.local.batch, rt.data.shape

        def load(rows: None, size: int) -> Batch:
            x, w = (torch.empty(size, *s, dtype=rt.dtype, device=rt.device) for s in (shape, ()))
            return {"x": x, "y": torch.zeros(size, dtype=torch.long, device=rt.device), "w": w}

        rt.chain(plan)  # built before the trace, of real values
        received = rt.received(rt.filled(plan), rt.state0)
        spans: list[Span] = []

        @contextmanager
        def probe(index: int, held: Tensors) -> Iterator[None]:
            with trace.span(held) as span:
                yield
            spans.append(span)

        with Trace(rt.device.type) as trace:
            at: Tensors = trace.fake(received)
            labels = trace.fake({"": torch.ones(rt.data.classes, dtype=torch.bool)})[""]
            client = Client(
                ctx=replace(rt.ctx(client=0, samples=size), labels=labels),
                at=at,
                batches=lambda phase, index: [np.arange(size)] * STEPS,
                load=load,
                noise=lambda index, step: rt.ctx(client=0).rng("trace"),
                always=trace.fake(rt.feed.always(torch.zeros(0, dtype=torch.long))),
            )
            del at
            rt.loop(probe).train([client], plan)
        return spans[0].parts


def candidate(plan: Plan) -> str:
    """What the bytes of a one-phase plan depend on, as canonical text."""
    (phase,) = plan.phases
    where, how = {"upto": phase.upto, "since": phase.since}, {"levels": phase.levels, "again": phase.again}
    bare = Phase(live=phase.live, still=phase.still, step=phase.step, **where, **how)  # type: ignore[arg-type]
    return key(replace(plan, phases=(bare,), up=(), weight="", reply=plan.reply))
