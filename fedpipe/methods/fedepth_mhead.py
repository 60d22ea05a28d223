"""m-FeDepth: FeDepth with a head of its own behind every unit. Zhang et al., 2023. https://arxiv.org/abs/2303.04887

A block is trained with the head behind its last unit, without a link; that head is averaged over the clients that
trained it, and stays as it is where nobody did. (The published code's weights of heads do that in the mean over rounds;
a head nobody trained becomes 0 there.) Settings are FeDepth's.
"""

from dataclasses import replace

from fedpipe.context import PlanCtx
from fedpipe.methods import fedepth
from fedpipe.types import Plan


def plan(ctx: PlanCtx) -> Plan | None:
    found = fedepth.plan(ctx)
    if found is None or ctx.h["average"] == "trained" or found.keep:
        return found
    trained = {ctx.head_of(phase.upto or ctx.units[-1]) for phase in found.phases}
    others = sorted({ctx.head_of(u) for u in ctx.units} - trained)
    return replace(found, up=("model/*", *(f"!{p}" for p in ctx.tensors(*others))))


method = replace(fedepth.method, name="fedepth_mhead", model={"exits": True}, plan=plan)
