"""InclusiveFL. Liu, Wu, Wu et al., KDD 2022. https://arxiv.org/abs/2202.08036

Clients train the bottom of one network, as many of its `sizes` parts as their budget holds, with a head for each size.
A layer is the mean, by samples, over all clients that have it. Momentum distillation: of what clients of a size bring
for their last layer, a share beta is replaced by what the next larger size's layers from there to its last brought on
average when it was last trained; layers of other shapes do not count, and in the first round there is none.
The published code, whose server runs AdamW per size, overwrites where it should sum; one size is FedAvg.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from fedpipe.context import Ctx
from fedpipe.planning import PlanCtx
from fedpipe.types import Method, Phase, Plan, Tensors, Update, under


def plan(ctx: PlanCtx) -> Plan | None:
    def bottom(size: int) -> Plan:
        depth = ctx.units.index(ctx.exits[size]) + 1
        held = ctx.tensors(ctx.stem, *ctx.units[:depth], ctx.head_of(ctx.exits[size]))
        return Plan(phases=(Phase(live=held),), down=held, up=held, model=(("depth", depth), ("inner", False)))

    return ctx.first(bottom(s) for s in range(len(ctx.exits) - 1, -1, -1))


def init(model: Tensors, ctx: Ctx) -> Tensors:
    """What the larger size brought, by the size that learns from it; nothing yet."""
    assert ctx.chain is not None
    last = {f"server/{s}/{n}": t for s, u in enumerate(ctx.chain.ends[:-1])
            for n, t in under(model, f"model/{u}.").items()}  # fmt: skip
    sizes = {f"server/known/{s}": torch.zeros(()) for s in range(ctx.h["sizes"] - 1)}
    return {**model, **{n: torch.zeros_like(t) for n, t in last.items()}, **sizes}


def aggregate(state: Tensors, updates: Iterable[Update], ctx: Ctx) -> Tensors:
    assert ctx.chain is not None
    chain, beta, marks = ctx.chain, ctx.h["beta"], ctx.chain.ends
    heads = [chain.head_of(u) for u in marks]
    sums = [dict[str, torch.Tensor]() for _ in marks]
    weights = [0.0] * len(marks)

    def passing() -> Iterator[Update]:
        for u in updates:
            size = max(s for s, h in enumerate(heads) if under(u.tensors, f"model/{h}."))
            for n in [n for n in u.tensors if n in state] if size else []:
                step = u.weight * (u.tensors[n].double() - state[n].double())
                sums[size][n] = sums[size][n] + step if n in sums[size] else step
            weights[size] += u.weight
            last = f"model/{marks[size]}."
            learns = size + 1 < len(marks) and bool(state[f"server/known/{size}"] > 0)
            mine = under(u.tensors, last) if learns else {}
            new = {f"{last}{n}": (1 - beta) * t + beta * (state[f"{last}{n}"] + state[f"server/{size}/{n}"])
                   for n, t in mine.items()}  # fmt: skip
            yield replace(u, tensors={**u.tensors, **new})

    found = ctx.mean(state, passing())
    for size in (s for s in range(len(marks) - 1) if weights[s + 1]):
        units = chain.names[chain.names.index(marks[size]) : chain.names.index(marks[size + 1]) + 1]
        for n, old in under(state, f"server/{size}/").items():
            each = [sums[size + 1].get(f"model/{u}.{n}") for u in units]
            like = [t for t in each if t is not None and t.shape == old.shape]
            found[f"server/{size}/{n}"] = (torch.stack(like).mean(0) / weights[size + 1]).to(old.dtype)
        found[f"server/known/{size}"] = torch.ones(())
    return found


method = Method(name="inclusivefl", model=lambda h: {"exits": h["sizes"]}, plan=plan, init=init, aggregate=aggregate,
                h={"sizes": 3, "beta": 0.2})  # fmt: skip
