"""EmbracingFL. Lee, Zhang, Xing et al., 2024. https://arxiv.org/abs/2406.15125

A client trains as many consecutive units at the output side as its budget holds, the head with them (and the stem with
all units); those before are run, frozen, and what they give can be kept (`local.batches: fixed`). It receives the whole
model and sends what it trained, which is averaged by samples over the clients that did. How a weak client runs the
frozen part piece by piece, and the mean, are recalled: the paper was not at hand. A budget for all is FedAvg.
"""

from fedpipe.planning import PlanCtx
from fedpipe.types import Method, Phase, Plan


def plan(ctx: PlanCtx) -> Plan | None:
    def last(count: int) -> Plan:
        units = (*ctx.units[len(ctx.units) - count :], ctx.head)
        live = ctx.tensors(*units) if count < len(ctx.units) else ("model/*",)
        return Plan(phases=(Phase(live=live),), up=live)

    return ctx.first(last(k) for k in range(len(ctx.units), 0, -1))


method = Method(name="embracingfl", plan=plan)
