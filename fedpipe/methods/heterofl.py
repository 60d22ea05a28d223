"""HeteroFL. Diao, Ding and Tarokh, ICLR 2021. https://arxiv.org/abs/2010.01264

A client trains the first ceil(r C) channels of every layer, r the largest of `widths` whose predicted peak its budget
holds; the server takes the unweighted mean of each entry over the clients that hold it, and keeps the entries nobody
holds. With `scaler`, activations are divided by r before each norm while training. Full width is FedAvg (uniform).
labels  a row of the classifier is averaged over the clients that have its class alone
clip    the largest norm of a gradient; 0: any
The published code has labels and clips at 1. Its other two parts are a study's: `local.loss: masked_client`, which
leaves absent classes out of the loss, and `evaluate.norm: train`, batch norm by statistics of training rows.
"""

import torch
from torch import nn

from fedpipe.context import Ctx, Grad
from fedpipe.planning import PlanCtx
from fedpipe.types import Batch, Method, Plan, Tensors, under


def plan(ctx: PlanCtx) -> Plan | None:
    def slim(r: float) -> Plan:
        scale = {"scale": r} if ctx.h["scaler"] and r < 1 else {}
        build = {"width": r, **scale} if r < 1 else {}
        return Plan(index=ctx.windows(**build), model=tuple(build.items()), weight="one")

    return ctx.first(slim(r) for r in sorted(ctx.h["widths"], reverse=True))


def direction(grad: Grad, at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensors, Tensors]:
    found = grad()
    if not ctx.h["clip"]:
        return found, {}
    norm = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
    return {n: g * (ctx.h["clip"] / (norm + 1e-6)).clamp(max=1) for n, g in found.items()}, {}


def end(at: Tensors, ctx: Ctx) -> tuple[Tensors, Tensors]:
    """Masks of the classifier's rows: which this client's labels count for."""
    if not ctx.h["labels"]:
        return {}, {}
    assert ctx.chain is not None and ctx.labels is not None
    head, shown = ctx.chain.names[-1], ctx.labels
    layers = [n for n, m in ctx.chain.get_submodule(head).named_modules(prefix=head) if isinstance(m, nn.Linear)]
    rows = under(at, f"model/{layers[-1]}.", f"mask/model/{layers[-1]}.")
    return {n: shown.to(t.device).view(-1, *[1] * (t.dim() - 1)).expand(t.shape).contiguous()
            for n, t in rows.items()}, {}  # fmt: skip


method = Method(name="heterofl", plan=plan, direction=direction, end=end, h={
    "widths": [1.0, 0.5, 0.25, 0.125, 0.0625], "scaler": True, "labels": False, "clip": 0.0,
})  # fmt: skip
