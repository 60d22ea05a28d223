"""ProgFed. Wang, Stich, He and Fritz, ICML 2022. https://arxiv.org/abs/2110.05323

The network grows while it is trained: in S = `stages` parts, each of the first S - 1 for T / (2 S) of the T rounds with
a head of its own behind the part, then whole. Clients train, receive and send what there is by then, and are averaged
uniformly; what is predicted is what the grown network gives. warmup: in the first rounds of a new part only it and its
head are trained; the published code adds 25 such rounds to T, here they are some of it. One stage is FedAvg (uniform).
"""

from collections.abc import Iterable

import torch

from fedpipe.context import Ctx
from fedpipe.planning import PlanCtx
from fedpipe.types import Batch, Method, Phase, Plan, Tensors, Update


def stage(round: int, rounds: int, stages: int) -> tuple[int, int]:
    """The part that is trained last in a round, and how many rounds ago it came; both from 0."""
    each = max(1, rounds // (2 * stages))
    now = min(round // each, stages - 1)
    return now, round - now * each


def plan(ctx: PlanCtx) -> Plan | None:
    now, since = stage(ctx.round, ctx.rounds, len(ctx.exits))
    depth = ctx.units.index(ctx.exits[now]) + 1
    before = ctx.units.index(ctx.exits[now - 1]) + 1 if now else 0
    head = ctx.head_of(ctx.exits[now])
    held = ctx.tensors(ctx.stem, *ctx.units[:depth], head)
    live = ctx.tensors(*ctx.units[before:depth], head) if now and since < ctx.h["warmup"] else held
    model = (("depth", depth), ("inner", False))
    return ctx.if_fits(Plan(phases=(Phase(live=live),), down=held, up=live, model=model, weight="one"))


def init(model: Tensors, ctx: Ctx) -> Tensors:
    return {**model, "server/stage": torch.zeros((), dtype=torch.int64)}


def aggregate(state: Tensors, updates: Iterable[Update], ctx: Ctx) -> Tensors:
    """The mean, and the last part it has been trained with."""
    assert ctx.chain is not None
    now, _ = stage(ctx.round, ctx.rounds, len(ctx.chain.ends))
    return {**ctx.mean(state, updates), "server/stage": torch.tensor(now)}


def predict(at: Tensors, batch: Batch, ctx: Ctx) -> Tensors:
    assert ctx.chain is not None
    now = ctx.chain.ends[int(at["in/server/stage"])]
    (z,), _ = ctx.exits(at, batch["x"], [now], "in/model/")
    return {"global": z}


method = Method(
    name="progfed", by_round=True, model=lambda h: {"exits": h["stages"]}, plan=plan, init=init, aggregate=aggregate,
    predict=predict, h={"stages": 4, "warmup": 0},
)  # fmt: skip
