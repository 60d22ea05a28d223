"""HeteroFL. Diao, Ding and Tarokh, ICLR 2021. https://arxiv.org/abs/2010.01264

A client trains the first ceil(r C) channels of every layer, r the largest of `widths` whose predicted peak its budget
holds; the server takes the unweighted mean of each entry over the clients that hold it, and keeps the entries nobody
holds. With `scaler`, activations are divided by r before each norm while training. Full width is FedAvg (uniform).
The published code also masks logits of classes a client lacks, clips gradients at norm 1 and averages a classifier row
over the clients that own its label; these are not part of this record.
"""

from fedpipe.context import PlanCtx
from fedpipe.types import Method, Plan


def plan(ctx: PlanCtx) -> Plan | None:
    def slim(r: float) -> Plan:
        scale = {"scale": r} if ctx.h["scaler"] and r < 1 else {}
        build = {"width": r, **scale} if r < 1 else {}
        return Plan(index=ctx.windows(**build), model=tuple(build.items()), weight="one")

    return ctx.first(slim(r) for r in sorted(ctx.h["widths"], reverse=True))


method = Method(name="heterofl", h={"widths": [1.0, 0.5, 0.25, 0.125, 0.0625], "scaler": True}, plan=plan)
