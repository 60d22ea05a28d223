"""FedAvg. McMahan et al., AISTATS 2017. https://arxiv.org/abs/1602.05629

w <- sum_k (n_k / n) w_k over the cohort, w_k from local SGD on client k's data. Every hook but `plan` is the default;
a client whose budget does not hold what it trains is left out.
part  of the model that is trained and sent: full, body or head; the rest stays as state 0 has it, on every client
"""

from fedpipe.planning import PlanCtx
from fedpipe.types import Method, Phase, Plan


def plan(ctx: PlanCtx) -> Plan | None:
    live, rest = ctx.part(ctx.h["part"])
    return ctx.if_fits(Plan(phases=(Phase(live=live),), down=live, fixed=rest, up=live) if rest else Plan())


method = Method(name="fedavg", plan=plan, h={"part": ("full", "body", "head")})
