"""DepthFL. Kim, Yu, Kim and Moon, ICLR 2023. https://openreview.net/forum?id=pf8RIZTMU58

The network has `exits` classifiers, behind parts of as many units. A client trains the first d of the parts with their
classifiers, d as large as its budget holds, by the sum of
CE(o_i, y) + w(t) / (d - 1) sum_{j != i} KL(softmax(o_j) || softmax(o_i)) over its classifiers i, the other's output
taken as fixed; w(t) = exp(-5 (1 - min(t, ramp) / ramp)^2) in round t, ramp 300 in the published code. Every tensor is
the unweighted mean over the clients that have it; what is predicted is the mean of all classifiers' outputs.
distil: False leaves the second term out. A classifier here is the network's own head for the part's features; the
paper's has a bottleneck before it. FedDyn, an option there, is none here.
"""

from math import exp

import torch
from torch import Tensor

from fedpipe.context import Ctx
from fedpipe.loop.client import default_begin
from fedpipe.planning import PlanCtx
from fedpipe.types import Batch, Method, Phase, Plan, Tensors


def deep(ctx: PlanCtx, parts: int) -> Plan:
    """The first parts with their classifiers."""
    ends = ctx.exits[:parts]
    depth = ctx.units.index(ends[-1]) + 1
    held = ctx.tensors(ctx.stem, *ctx.units[:depth], *map(ctx.head_of, ends))
    model = (("depth", depth),) if depth < len(ctx.units) else ()
    return Plan(phases=(Phase(live=held),), down=held, up=held, model=model, weight="one")


def plan(ctx: PlanCtx) -> Plan | None:
    return ctx.first(deep(ctx, d) for d in range(len(ctx.exits), 0, -1))


def begin(at: Tensors, ctx: Ctx) -> Tensors:
    model, ramp = default_begin(at, ctx), ctx.h["ramp"]
    pull = exp(-5 * (1 - min(ctx.round, ramp) / ramp) ** 2)
    return {**model, "tmp/pull": next(iter(model.values())).new_full((), pull)}


def loss(at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensor, Tensors]:
    assert ctx.chain is not None
    outputs, changed = ctx.exits(at, batch["x"], ctx.chain.ends)
    value = torch.stack([ctx.task(z, batch) for z in outputs]).sum()
    if ctx.h["distil"] and len(outputs) > 1:
        logs = [z.log_softmax(-1) for z in outputs]
        apart = [far.detach().exp() * (far.detach() - near) for near in logs for far in logs if far is not near]
        kl = torch.stack(apart).sum((0, -1)) / (len(outputs) - 1)
        value = value + at["tmp/pull"] * (kl * batch["w"]).sum()
    return value, changed


def predict(at: Tensors, batch: Batch, ctx: Ctx) -> Tensors:
    assert ctx.chain is not None
    outputs, _ = ctx.exits(at, batch["x"], ctx.chain.ends, "in/model/")
    return {"global": torch.stack(outputs).mean(0)}


method = Method(
    name="depthfl", model=lambda h: {"exits": h["exits"]}, plan=plan, begin=begin, loss=loss, predict=predict,
    h={"exits": 4, "distil": True, "ramp": 300},
)  # fmt: skip
