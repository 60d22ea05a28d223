"""m-FeDepth: FeDepth with a head of its own behind every unit. Zhang et al., 2023. https://arxiv.org/abs/2303.04887

A block is trained with the head behind its last unit, without a link; that head is averaged over the clients that
trained it, and stays as it is where nobody did. Settings are FeDepth's; faithful adds, as published for fair,
- weights of heads in the mean over all samples: those behind units 1 to 5 count WEIGHTS times where a client trained
  them and 0 where not, so that one nobody trained becomes 0; all other tensors count once, trained or not
- a frozen last block of six (blocks: paper): the block before it is trained on, through it, with the last head
For lack the published code goes by the same four groups, whatever these train there; here a head's trainers count.
"""

from dataclasses import replace

from fedpipe.context import Ctx
from fedpipe.methods import fedepth
from fedpipe.planning import PlanCtx
from fedpipe.types import Plan, Tensors, select

WEIGHTS = 4, 2, 2, 2, 4


def through(found: Plan, ctx: PlanCtx) -> Plan:
    """Six blocks, the last of them frozen: the one before is trained with the last head."""
    first, last = (ctx.units.index(p.upto) + 1 for p in found.phases[3:5] if p.upto)
    moves = ctx.tensors(*ctx.units[first:last], ctx.head)
    end = replace(found.phases[5], still=("model/*", *(f"!{p}" for p in moves)))
    up = (*found.up, *(f"!{p}" for p in ctx.tensors(*ctx.units[last:])))
    return replace(found, phases=(*found.phases[:5], end), up=up)


def plan(ctx: PlanCtx) -> Plan | None:
    found, faithful = fedepth.plan(ctx), ctx.h["faithful"]
    if found and faithful and ctx.h["blocks"] == "paper" and len(found.phases) == 6:
        found = through(found, ctx)
    if found is None or ctx.h["average"] == "trained":
        return found
    if faithful:  # `end` sees no more than the client's units: it has these heads, in order, from here
        weighted = (ctx.head_of(u) for u in ctx.units[:-1][: len(WEIGHTS)])
        return replace(found, up=("model/*", *ctx.tensors(*weighted)))
    if found.keep:
        return found
    trained = {ctx.head_of(phase.upto or ctx.units[-1]) for phase in found.phases}
    others = sorted({ctx.head_of(u) for u in ctx.units} - trained)
    return replace(found, up=("model/*", *(f"!{p}" for p in ctx.tensors(*others))))


def end(at: Tensors, ctx: Ctx) -> tuple[Tensors, Tensors]:
    """Heads times their weights: the server's mean of them is then the published one."""
    assert ctx.plan and ctx.chain
    if not ctx.h["faithful"] or ctx.h["average"] == "trained":
        return {}, {}
    trained = {f"model/{ctx.chain.head_of(phase.upto)}.*" for phase in ctx.plan.phases if phase.upto}
    heads = zip(ctx.plan.up[1:], WEIGHTS, strict=False)
    return {n: t * (w if p in trained else 0) for p, w in heads for n, t in select(at, (p,)).items()}, {}


method = replace(fedepth.method, name="fedepth_mhead", model={"exits": True}, plan=plan, end=end)
