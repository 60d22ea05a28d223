"""FedProx. Li et al., MLSys 2020. https://arxiv.org/abs/1812.06127

Each client minimises f_k(w) + (mu / 2) ||w - w_t||^2: the local gradient at w gains mu (w - w_t), where w_t
(`in/model/*`) is the model received this round. mu = 0 is FedAvg.
"""

from fedpipe.planning import PlanCtx
from fedpipe.types import Method, Phase, Plan, Step


def plan(ctx: PlanCtx) -> Plan | None:
    step = Step(anchor="in/model/*", mu=ctx.h["mu"])
    return ctx.if_fits(Plan(phases=(Phase(step=step),), hold=("in/model/*",)))


method = Method(name="fedprox", h={"mu": 0.01}, plan=plan)
