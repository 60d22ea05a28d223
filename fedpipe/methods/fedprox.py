"""FedProx. Li et al., MLSys 2020. https://arxiv.org/abs/1812.06127

Each client minimises f_k(w) + (mu / 2) ||w - w_t||^2: the local gradient at w gains mu (w - w_t), where w_t
(`in/model/*`) is the model received this round. mu = 0 is FedAvg.
"""

from fedpipe.context import Ctx, PlanCtx
from fedpipe.types import Batch, Method, Plan, Tensors


def plan(ctx: PlanCtx) -> Plan | None:
    return ctx.if_fits(Plan(hold=("in/model/*",)))


def direction(grad, at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensors, Tensors]:  # type: ignore[no-untyped-def]
    return {n: g + ctx.h["mu"] * (at[n] - at[f"in/{n}"]) for n, g in grad().items()}, {}


method = Method(name="fedprox", h={"mu": 0.01}, plan=plan, direction=direction)
