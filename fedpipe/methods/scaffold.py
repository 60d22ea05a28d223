"""SCAFFOLD. Karimireddy et al., ICML 2020. https://arxiv.org/abs/1910.06378

Local step y <- y - eta (g(y) - c_i + c). After K steps, option II: c_i+ = c_i - c + (x - y) / (K eta);
server x <- x + mean(y - x), c <- c + (|S| / N) mean(c_i+ - c_i). Here c is `server/c/*`, c_i is `own/c/*`,
c_i - c is `tmp/h/*`. The mean is uniform. With full participation c stays the mean of the c_i. Plain SGD is assumed
in c_i+.
"""

from collections.abc import Iterable, Iterator

import torch

from fedpipe.context import Ctx
from fedpipe.planning import PlanCtx
from fedpipe.types import Method, Phase, Plan, Step, Tensors, Update, under


def plan(ctx: PlanCtx) -> Plan | None:
    phases, down = (Phase(step=Step(variate="tmp/h/*")),), ("model/*", "server/c/*")
    return ctx.if_fits(Plan(phases, down, hold=("in/model/*",), keep=("own/c/*",), weight="one"))


def init(model: Tensors, ctx: Ctx) -> Tensors:
    return {**model, **{f"server/c/{n[6:]}": torch.zeros_like(t) for n, t in model.items() if t.is_floating_point()}}


def begin(at: Tensors, ctx: Ctx) -> Tensors:
    c = under(at, "in/server/c/")
    mine = under(at, "own/c/") or {n: torch.zeros_like(t) for n, t in c.items()}
    h = {f"tmp/h/{n}": t - c[n] for n, t in mine.items()}
    return {**under(at, "in/model/", "model/"), **{f"own/c/{n}": t for n, t in mine.items()}, **h}


def end(at: Tensors, ctx: Ctx) -> tuple[Tensors, Tensors]:
    new = {
        n: h + (at[f"in/model/{n}"] - at[f"model/{n}"]) / (ctx.steps * ctx.lr) for n, h in under(at, "tmp/h/").items()
    }
    return {f"delta/c/{n}": c - at[f"own/c/{n}"] for n, c in new.items()}, {f"own/c/{n}": c for n, c in new.items()}


def aggregate(state: Tensors, updates: Iterable[Update], ctx: Ctx) -> Tensors:
    c = under(state, "server/c/", "server/c/")

    def passing() -> Iterator[Update]:
        for u in updates:
            c.update({n: c[n] + d / ctx.clients for n, d in under(u.tensors, "delta/c/", "server/c/").items()})
            yield u

    return {**ctx.mean(state, passing()), **c}


method = Method(name="scaffold", plan=plan, init=init, begin=begin, end=end, aggregate=aggregate)
