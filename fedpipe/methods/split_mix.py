"""Split-Mix. Hong, Wang, Wang and Zhou, ICLR 2022. https://arxiv.org/abs/2203.09747

floor(1 / atom) base networks of width `atom`, each with values of its own, stand for the whole. A client with a budget
of ratio r receives, trains and sends floor(r / atom) of them (fewer where its bytes hold fewer), one after another: one
by a shuffled order that all go round (by round + client: ours), the others drawn. A base, `model/*` or `base/k/*`, is
the mean, by samples, over those who trained it; predicted is the mean of all outputs. One atom of 1 is FedAvg.
"""

from math import floor

import torch
from torch import Tensor

from fedpipe.context import Ctx
from fedpipe.errors import FedpipeError
from fedpipe.planning import PlanCtx
from fedpipe.rng import rng
from fedpipe.types import Batch, Method, Phase, Plan, Tensors, under


def name(base: int) -> str:
    return f"base/{base}" if base else "model"


def many(ratio: float, atom: float) -> int:
    return floor(ratio / atom + 1e-9)


def plan(ctx: PlanCtx) -> Plan | None:
    atom, ratio = ctx.h["atom"], 1.0 if ctx.row.ratio is None else min(1.0, ctx.row.ratio)
    if many(ratio, atom) == 0:
        raise FedpipeError(f"split_mix: ratio {ratio:g} trains no base of width {atom:g}; lower atom")

    def first(count: int) -> Plan:
        phases = tuple(Phase(f"base{j}", live=(f"{name(j)}/*",)) for j in range(count))
        return Plan(phases=phases, down=tuple(f"{{b{j}}}/*" for j in range(count)), up=())

    return ctx.first(first(m) for m in range(many(ratio, atom), 0, -1))


def order(ctx: Ctx) -> list[int]:
    """The bases as this client takes them in this round: the one whose turn it is, then at random."""
    bases = many(1, ctx.h["atom"])
    turn = int(rng(ctx.seed, purpose="bases").permutation(bases)[(ctx.round + (ctx.client or 0)) % bases])
    return [turn, *(int(b) for b in ctx.rng("bases").permutation(bases) if b != turn)]


def fill(ctx: Ctx) -> dict[str, str]:
    return {f"b{j}": name(b) for j, b in enumerate(order(ctx))}


def init(model: Tensors, ctx: Ctx) -> Tensors:
    assert ctx.fresh is not None
    each = {name(b): ctx.fresh(name(b)) for b in range(1, many(1, ctx.h["atom"]))}
    return {**model, **{f"{base}/{n}": t for base, drawn in each.items() for n, t in drawn.items()}}


def begin(at: Tensors, ctx: Ctx) -> Tensors:
    taken = enumerate(order(ctx)[: len(ctx.plan.down) if ctx.plan else 1])
    return {n: t for j, b in taken for n, t in under(at, f"in/{name(b)}/", f"{name(j)}/").items()}


def loss(at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensor, Tensors]:
    j = int(ctx.phase.name[4:]) if ctx.phase else 0
    z, changed = ctx.forward(at, batch["x"], f"{name(j)}/")
    return ctx.task(z, batch), changed


def end(at: Tensors, ctx: Ctx) -> tuple[Tensors, Tensors]:
    taken = enumerate(order(ctx)[: len(ctx.plan.down) if ctx.plan else 1])
    return {n: t for j, b in taken for n, t in under(at, f"{name(j)}/", f"{name(b)}/").items()}, {}


def predict(at: Tensors, batch: Batch, ctx: Ctx) -> Tensors:
    each = [ctx.apply(at, batch["x"], f"in/{name(b)}/") for b in range(many(1, ctx.h["atom"]))]
    return {"global": torch.stack(each).mean(0)}


method = Method(name="split_mix", model=lambda h: {"width": h["atom"]} if h["atom"] < 1 else {}, h={"atom": 0.125},
                plan=plan, fill=fill, init=init, begin=begin, loss=loss, end=end, predict=predict)  # fmt: skip
