"""FeDepth. Zhang et al., 2023. https://arxiv.org/abs/2303.04887

A client cuts the chain of units into blocks that its memory holds, in depth order, and trains them one after another
in every round: block j with all before it frozen, through a parameter-free link (subsample, zero-pad) into the shared
head phi, min over (theta_j, phi) of CE(phi(link(z_j)), y). Units after block j do not run. The head is live in every
block and keeps its optimizer state from block to block; the stem is trained with the first block. Everything is sent
and averaged by samples. A client that holds all units in one block is FedAvg's.
"""

from fedpipe.context import PlanCtx
from fedpipe.types import Method, Phase, Plan


def phases(ctx: PlanCtx, blocks: list[tuple[str, ...]]) -> tuple[Phase, ...]:
    """One phase per block; alone, a block that ends the chain needs no `upto`."""
    out = []
    for j, block in enumerate(blocks):
        live = ctx.tensors(*([ctx.stem] if block[0] == ctx.units[0] else []), *block, ctx.head)
        upto = None if block[-1] == ctx.units[-1] else block[-1]
        out.append(Phase(f"block{j + 1}", live=live, upto=upto, carry=j + 1 < len(blocks)))
    return tuple(out)


def decompose(ctx: PlanCtx) -> list[tuple[str, ...]] | None:
    """Greedy in depth order: extend the block while its predicted peak stays within the budget; None when one unit
    alone does not fit."""
    blocks: list[tuple[str, ...]] = []
    for unit in ctx.units:
        longer = (*blocks[-1], unit) if blocks else (unit,)
        if blocks and ctx.fits(Plan(phases=phases(ctx, [longer]))):
            blocks[-1] = longer
        elif ctx.fits(Plan(phases=phases(ctx, [(unit,)]))):
            blocks.append((unit,))
        else:
            return None
    return blocks


def plan(ctx: PlanCtx) -> Plan | None:
    blocks = decompose(ctx)
    return Plan(phases=phases(ctx, blocks)) if blocks else None


method = Method(name="fedepth", plan=plan)
