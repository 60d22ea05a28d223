"""FeDepth. Zhang et al., 2023. https://arxiv.org/abs/2303.04887

A client cuts the chain of units into blocks that its memory holds, and trains them in depth order in every round: block
j with all before it frozen and none behind it run, through a parameter-free link (subsample, zero-pad) into the shared
head phi, min over (theta_j, phi) of CE(phi(link(z_j)), y). The head keeps its optimizer state from block to block, the
stem is trained with the first. Everything is sent, and averaged by samples. One block of all units is FedAvg.
blocks    bytes: the fewest whose predicted peaks fit the budget; paper: the published ones, by activation counts for
          the budget's ratio, whatever they take in bytes
scenario  lack: first units too large for a client are left out of its forward; surplus: one that holds two models
          trains a peer of its own beside the model, by mutual distillation; auto: that of the study's budgets, or fair
average   all: every tensor, trained or not (as published); trained: each over the clients that trained it
faithful  frozen tensors have gradients of 0, and move by momentum and decay: the published code with torch 1.7
"""

from collections.abc import Sequence
from functools import partial

from fedpipe.context import Ctx
from fedpipe.errors import FedpipeError
from fedpipe.loop.client import default_begin
from fedpipe.planning import PlanCtx
from fedpipe.types import Batch, Method, Phase, Plan, Tensors, under

MUTUAL = Plan(phases=(Phase("mutual", live=("model/*", "own/peer/*")),), keep=("own/peer/*",))


def trained(ctx: PlanCtx, block: tuple[str, ...], skip: int) -> tuple[str, ...]:
    return ctx.tensors(*([ctx.stem] if block[0] == ctx.units[skip] else []), *block, ctx.head_of(block[-1]))


def phases(ctx: PlanCtx, blocks: Sequence[tuple[str, ...]], skip: int = 0) -> tuple[Phase, ...]:
    out = list[Phase]()
    for j, block in enumerate(blocks):
        live = trained(ctx, block, skip)
        upto = None if block[-1] == ctx.units[-1] else block[-1]
        still = ("model/*", *(f"!{p}" for p in live)) if ctx.h.get("faithful") else ()
        live = ("model/*",) if still else live
        out.append(Phase(f"block{j + 1}", live=live, still=still, upto=upto, carry=j + 1 < len(blocks)))
    return tuple(out)


def build(ctx: PlanCtx, skip: int, blocks: Sequence[tuple[str, ...]]) -> Plan:
    each = dict.fromkeys(p for block in blocks for p in trained(ctx, block, skip))
    up = ("model/*",) if ctx.h["average"] == "all" else tuple(each)
    return Plan(phases=phases(ctx, blocks, skip), up=up, model=(("skip", skip),) if skip else ())


def plan(ctx: PlanCtx) -> Plan | None:
    given, scenario = ctx.scenario, ctx.h["scenario"]
    if scenario not in ("auto", given or scenario):
        raise FedpipeError(f"methods: scenario {scenario}, but budgets.scenario is {given}; wanted one of the two")
    scenario = (given or "fair") if scenario == "auto" else scenario
    most, surplus = ctx.skippable if scenario == "lack" else 0, scenario == "surplus"
    if ctx.h["blocks"] == "paper":
        if surplus and (ctx.row.ratio is None or ctx.row.ratio >= 2):
            return MUTUAL
        blocks, unfit = ctx.greedy()
        return build(ctx, len(unfit), blocks) if blocks and unfit == [*ctx.units[: min(len(unfit), most)]] else None
    spare = ctx.if_fits(MUTUAL) if surplus else None
    return spare or next((p for k in range(most + 1) if (p := ctx.fewest(partial(build, ctx, k), k))), None)


def begin(at: Tensors, ctx: Ctx) -> Tensors:
    """A peer starts as the first model that its client receives."""
    model = default_begin(at, ctx)
    new = ctx.plan and ctx.plan.keep and not under(at, "own/peer/")
    return {**model, **({n: t.clone() for n, t in under(model, "model/", "own/peer/").items()} if new else {})}


def mutual(at: Tensors, batch: Batch, ctx: Ctx) -> tuple[object, Tensors]:
    """CE of both, and of each the KL divergence from what the other gives, T = 1; the mean over the batch."""
    (a, changed), (b, more) = (ctx.forward(at, batch["x"], p) for p in ("model/", "own/peer/"))
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    apart = sum((far.detach().exp() * (far.detach() - near)).sum(-1) for near, far in ((p, q), (q, p)))
    return ctx.task(a, batch) + ctx.task(b, batch) + (apart * batch["w"]).sum(), {**changed, **more}


method = Method(name="fedepth", plan=plan, begin=begin, loss={"mutual": mutual}, h={"faithful": False,
    "blocks": ("bytes", "paper"), "scenario": ("auto", "fair", "lack", "surplus"), "average": ("all", "trained"),
})  # fmt: skip
