"""HIST. Fang, Han and Brinton, 2023. https://arxiv.org/abs/2310.17890

Client i is of cell i mod `cells`. Every global round k the model is cut into one sub-model per cell, by disjoint masks
p_c with sum_c p_c = 1. Clients of cell c train p_c x, the rest 0; after every round the cell's edge takes their mean,
after `period` of these rounds the cloud x = sum_c p_c x_c. One cell and period 1 are FedAvg. p_c is `tmp/mask/*`, x_c
the state of node e<c>, which has the cloud's values where p_c is 0.
What masks divide is ours: hidden units, equal counts of channels alike in all layers. An entry goes with its output
unit, of the last layer's weight with its input unit; what has neither, as the last bias, with cell k mod `cells`.
Messages are whole tensors. Rounds behind the last whole period do not reach the cloud.
"""

from collections.abc import Iterable, Iterator

import torch

from fedpipe.context import Ctx, RouteCtx
from fedpipe.errors import FedpipeError
from fedpipe.planning import PlanCtx
from fedpipe.rng import rng
from fedpipe.types import Method, Mix, Phase, Plan, Step, Tensors, Train, Update, under


def plan(ctx: PlanCtx) -> Plan | None:
    cells, period = ctx.h["cells"], ctx.h["period"]
    if min(cells, period) < 1:
        raise FedpipeError(f"methods.hist: cells {cells}, period {period}; wanted 1 or more")
    return ctx.if_fits(Plan((Phase(step=Step(mask="tmp/mask/*") if cells > 1 else None),)))


def route(ctx: RouteCtx) -> Iterator[Train | Mix]:
    cells, period = ctx.h["cells"], ctx.h["period"]
    for t in range(ctx.rounds):
        cohort, edges = list(ctx.cohort(t)), tuple(f"e{c}@{t + 1}" for c in range(cells))
        start = [f"e{c}@{t}" if t % period else f"server@{t}" for c in range(cells)]
        yield from (Train(t, i, start[i % cells]) for i in cohort)
        for c, edge in enumerate(edges):
            yield Mix(t, edge, start[c], tuple(Train(t, i, "").id for i in cohort if i % cells == c), f"e{c}")
        yield Mix(t, f"server@{t + 1}", f"server@{t}", (), states=() if (t + 1) % period else edges)


def owners(model: Tensors, ctx: Ctx) -> Tensors:
    """The cell of every entry of a model's tensors (by their names in it) in a global round; they broadcast."""
    assert ctx.chain is not None
    cells, k, names = ctx.h["cells"], ctx.round // ctx.h["period"], ctx.chain.tensor_names
    last = next((n.rpartition(".")[0] for n in reversed(names) if n.startswith(f"{ctx.chain.names[-1]}.")), "")
    found, channels = dict[str, torch.Tensor](), 0
    for n in names:
        shape, dim, size = model[n].shape, 0, 0
        if shape and n.rpartition(".")[0] != last:
            dim = 0 if shape[0] > 1 else len(shape) - 1  # tokens are [1, ..., channels]
            channels = size = shape[dim]
        elif len(shape) > 1 and channels and shape[1] % channels == 0:
            dim, size = 1, channels
        cell = rng(ctx.seed, k, None, "cells").permutation(size) * cells // size if size else k % cells
        view = [-1 if d == dim else 1 for d in range(len(shape))] if size else []
        each = shape[dim] // size if size else 1  # pixels of a channel lie together
        found[n] = torch.tensor(cell, device=model[n].device).repeat_interleave(each).view(view)
    return found


def begin(at: Tensors, ctx: Ctx) -> Tensors:
    model = under(at, "in/model/")
    if ctx.h["cells"] == 1 or ctx.role == "eval":
        return under(model, "", "model/")
    mine = {n: (cell == (ctx.client or 0) % ctx.h["cells"]).expand(model[n].shape)
            for n, cell in owners(model, ctx).items() if model[n].is_floating_point()}  # fmt: skip
    cut = {f"model/{n}": t.masked_fill(~mine[n], 0) if n in mine else t for n, t in model.items()}
    return cut | {f"tmp/mask/{n}": m for n, m in mine.items()}


def aggregate(state: Tensors, updates: Iterable[Update], ctx: Ctx) -> Tensors:
    cells = under(owners(under(state, "model/"), ctx), "", "model/")
    edge = ctx.node != "server"
    came = [(int(ctx.node[1:]), ctx.mean(state, updates))] if edge else enumerate(u.tensors for u in updates)
    for c, tensors in came:
        state = state | {n: torch.where(cell == c, tensors[n], state[n]) for n, cell in cells.items()}
    return state


method = Method(name="hist", h={"cells": 2, "period": 2}, plan=plan, route=route, begin=begin, aggregate=aggregate)
