"""FedFA. Park and Joe-Wong, 2024. https://arxiv.org/abs/2406.09877

A client trains the first ceil(r C) channels of every layer and, of every run of equal units, the first ceil(d n); r of
`widths` and d of `depths` are the largest in product that its budget holds. Layer grafting: at the server the units it
lacks are copies of the last it has of their run. Scalable aggregation: a tensor counts times the mean norm over clients
by its own norm, of the entries up to a `quantile` of their magnitude. Then the mean, by samples, of an entry over those
who hold it. What exactly is grafted and scaled is ours, from the abstract: no code was at hand. Whole networks without
`scale` are FedAvg.
"""

from collections.abc import Iterable
from dataclasses import replace
from math import ceil

from torch import Tensor

from fedpipe.context import Ctx
from fedpipe.models.chain import Chain
from fedpipe.planning import PlanCtx
from fedpipe.types import Method, Phase, Plan, Tensors, Update, under


def plan(ctx: PlanCtx) -> Plan | None:
    def cut(width: float, depth: float) -> Plan:
        lacks = [u for run in ctx.alike for u in run[ceil(round(depth * len(run), 9)) :]]
        build = ({"width": width} if width < 1 else {}) | ({"skip": " ".join(lacks)} if lacks else {})
        held = ("model/*", *(f"!{p}" for p in ctx.tensors(*lacks)))
        index = ctx.windows(width=width) if width < 1 else ()
        return Plan(phases=(Phase(live=held),), down=held, up=held, index=index, model=tuple(build.items()))

    sizes = [(r, d) for r in ctx.h["widths"] for d in ctx.h["depths"]]
    return ctx.first(cut(*s) for s in sorted(sizes, key=lambda s: (s[0] * s[1], s[0]), reverse=True))


def grafted(tensors: Tensors, chain: Chain) -> Tensors:
    out = dict(tensors)
    for run in chain.alike:
        has = [u for u in run if under(tensors, f"model/{u}.")]
        for u in run[len(has) :]:
            out |= under(tensors, f"model/{has[-1]}.", f"model/{u}.")
    return out


def norm(t: Tensor, quantile: float) -> float:
    size = t.double().abs().flatten()
    kept = size.kthvalue(max(1, ceil(quantile * len(size)))).values
    return float(size[size <= kept].norm())


def aggregate(state: Tensors, updates: Iterable[Update], ctx: Ctx) -> Tensors:
    assert ctx.chain is not None
    came = [replace(u, tensors=grafted(u.tensors, ctx.chain)) for u in updates]
    if not ctx.h["scale"]:
        return ctx.mean(state, came)
    norms = [{n: norm(t, ctx.h["quantile"]) for n, t in u.tensors.items() if t.is_floating_point()} for u in came]
    mean = {n: sum(each[n] for each in norms) / len(norms) for n in norms[0]}
    factors = [{n: mean[n] / size if size else 1.0 for n, size in each.items()} for each in norms]
    scaled = (replace(u, tensors={n: t * f.get(n, 1.0) for n, t in u.tensors.items()})
              for u, f in zip(came, factors, strict=True))  # fmt: skip
    return ctx.mean(state, scaled)


method = Method(name="fedfa", plan=plan, aggregate=aggregate, h={
    "widths": [1.0, 0.5, 0.25], "depths": [1.0, 0.5], "scale": True, "quantile": 0.95,
})  # fmt: skip
