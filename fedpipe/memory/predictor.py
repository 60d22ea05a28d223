"""Predicted bytes of plans: the real training loop of the method, run under fake tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from fedpipe.client import Client
from fedpipe.context import Ctx
from fedpipe.memory.parts import KINDS, Parts
from fedpipe.memory.predict import Span, Trace
from fedpipe.memory.stretch import Ranges
from fedpipe.models import REGISTRY
from fedpipe.phase import default_loss
from fedpipe.plans import key
from fedpipe.types import Batch, Method, Phase, Plan, Tensors

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
        plan = self.runtime.levelled(plan)
        return [self._phase(replace(plan, phases=(phase,))) for phase in plan.phases]

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
        received = rt.received(plan, rt.state0)
        spans: list[Span] = []

        @contextmanager
        def probe(index: int, held: Tensors) -> Iterator[None]:
            with trace.span(held) as span:
                yield
            spans.append(span)

        with Trace(rt.device.type) as trace:
            at: Tensors = trace.fake(received)
            client = Client(
                ctx=rt.ctx(client=0, samples=size),
                at=at,
                batches=lambda phase, index: [range(size)] * STEPS,
                load=load,
                noise=lambda index, step: rt.ctx(client=0).rng("trace"),
            )
            del at
            loop = rt.loop(probe)
            replace(loop, method=self._hastened(loop.method, plan)).train([client], plan)
        return spans[0].parts

    def _hastened(self, method: Method, plan: Plan) -> Method:
        """The method, whose first step only makes the optimizer's state: forward and backward are traced in the second.

        Only where a loss changes nothing but by its gradients, and every tensor of a unit that runs has one: the hooks
        of a method may do otherwise, and so may a user's network.
        """
        chain, (phase,) = self.runtime.chain(plan), plan.phases
        if method.loss is not None or chain.buffer_names or self.runtime.run.model.name not in REGISTRY:
            return method
        body = chain.names[:-1]
        run = {*body[: body.index(phase.upto) + 1 if phase.upto in body else None], chain.names[-1]}
        first = iter([True])

        def loss(at: Tensors, batch: Batch, ctx: Ctx) -> Any:
            reached = [t for n, t in at.items() if t.requires_grad and unit_of(n) in run]
            return _Nothing.apply(*reached) if next(first, False) and reached else default_loss(at, batch, ctx)

        return replace(method, loss=loss)


def unit_of(name: str) -> str | None:
    """The unit of a tensor of the model: `model/b1.conv.weight` is of b1."""
    return name.removeprefix("model/").partition(".")[0] if name.startswith("model/") else None


class _Nothing(torch.autograd.Function):
    """A loss of tensors that has gradients of their shapes, and saves nothing."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.like = [(t.shape, t.dtype, t.device) for t in tensors]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def candidate(plan: Plan) -> str:
    """What the bytes of a one-phase plan depend on, as canonical text."""
    (phase,) = plan.phases
    bare = Phase(live=phase.live, upto=phase.upto, step=phase.step, levels=phase.levels, again=phase.again)
    return key(replace(plan, phases=(bare,), up=(), weight="", reply=plan.reply))
