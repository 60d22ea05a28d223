"""SCAFFOLD. Karimireddy et al., ICML 2020. https://arxiv.org/abs/1910.06378

Local step y <- y - eta (g(y) - c_i + c). After K steps, option II: c_i+ = c_i - c + (x - y) / (K eta);
server x <- x + mean(y - x), c <- c + (|S| / N) mean(c_i+ - c_i). Here c is `server/c/*`, c_i is `own/c/*`.
The mean is uniform. With full participation c stays the mean of the c_i. Plain SGD is assumed in c_i+.
"""

from collections.abc import Iterable, Iterator

import torch

from fedpipe.aggregate import mean
from fedpipe.context import Ctx, PlanCtx
from fedpipe.types import Batch, Method, Plan, Tensors, Update, under


def plan(ctx: PlanCtx) -> Plan | None:
    down = ("model/*", "server/c/*")
    return ctx.if_fits(Plan(down=down, hold=("in/*",), keep=("own/c/*",), weight="one"))


def init(model: Tensors, ctx: Ctx) -> Tensors:
    return {**model, **{f"server/c/{n[6:]}": torch.zeros_like(t) for n, t in model.items() if t.is_floating_point()}}


def begin(at: Tensors, ctx: Ctx) -> Tensors:
    mine = {f"own/c/{n}": torch.zeros_like(c) for n, c in under(at, "in/server/c/").items()}
    return {**under(at, "in/model/", "model/"), **mine, **under(at, "own/", "own/")}


def direction(grad, at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensors, Tensors]:  # type: ignore[no-untyped-def]
    return {n: g - at[f"own/c/{n[6:]}"] + at[f"in/server/c/{n[6:]}"] for n, g in grad().items()}, {}


def end(at: Tensors, ctx: Ctx) -> tuple[Tensors, Tensors]:
    drift = {
        n: (at[f"in/model/{n}"] - at[f"model/{n}"]) / (ctx.steps * ctx.lr) - c
        for n, c in under(at, "in/server/c/").items()
    }
    own = {f"own/c/{n}": at[f"own/c/{n}"] + d for n, d in drift.items()}
    return {f"delta/c/{n}": d for n, d in drift.items()}, own


def aggregate(state: Tensors, updates: Iterable[Update], ctx: Ctx) -> Tensors:
    c = under(state, "server/c/", "server/c/")

    def passing() -> Iterator[Update]:
        for u in updates:
            c.update({n: c[n] + d / ctx.clients for n, d in under(u.tensors, "delta/c/", "server/c/").items()})
            yield u

    return {**mean(state, passing()), **c}


method = Method(
    name="scaffold", plan=plan, init=init, begin=begin, direction=direction, end=end, aggregate=aggregate
)  # fmt: skip
