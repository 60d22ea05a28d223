"""FedBABU. Oh, Kim and Yun, ICLR 2022. https://arxiv.org/abs/2106.06042

The body is federated, the head is not: it keeps its random initial value, equal on every client, requires no gradient
(the gradient flows through it to the body) and is never sent. At evaluation each client fine-tunes the whole network
(or `part`: body, head) on its own training rows. The mean is uniform, as in the published code.
"""

from fedpipe.planning import PlanCtx
from fedpipe.types import Method, Phase, Plan


def plan(ctx: PlanCtx) -> Plan | None:
    body, head = ctx.part("body")
    return ctx.if_fits(Plan(phases=(Phase(live=body),), down=body, fixed=head, up=body, weight="one"))


def finish(ctx: PlanCtx) -> Plan | None:
    live, _ = ctx.part(ctx.h["part"])
    tune = Phase("finetune", live=live, epochs=ctx.h["finetune_epochs"], lr=ctx.h["finetune_lr"])
    return ctx.if_fits(Plan(phases=(tune,), hold=("in/model/*",)))


method = Method(
    name="fedbabu", h={"finetune_epochs": 5, "finetune_lr": 0.01, "part": ("full", "body", "head")},
    plan=plan, finish=finish,
)  # fmt: skip
