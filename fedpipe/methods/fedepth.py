"""FeDepth. Zhang et al., 2023. https://arxiv.org/abs/2303.04887

A client cuts the chain of units into blocks that its memory holds, in depth order, and trains them one after another
in every round: block j with all before it frozen, through a parameter-free link (subsample, zero-pad) into the shared
head phi, min over (theta_j, phi) of CE(phi(link(z_j)), y). Units after block j do not run. The head is live in every
block and keeps its optimizer state from block to block; the stem is trained with the first block. Everything is sent
and averaged by samples. A client that holds all units in one block is FedAvg's. `blocks: bytes` are the fewest whose
predicted peaks fit the budget; `paper` the published ones, by activation counts for the budget's ratio, whatever they
take in bytes.
"""

from collections.abc import Sequence

from fedpipe.context import PlanCtx
from fedpipe.errors import FedpipeError
from fedpipe.types import Method, Phase, Plan


def phases(ctx: PlanCtx, blocks: Sequence[tuple[str, ...]]) -> tuple[Phase, ...]:
    """One phase per block; alone, a block that ends the chain needs no `upto`."""
    out = []
    for j, block in enumerate(blocks):
        live = ctx.tensors(*([ctx.stem] if block[0] == ctx.units[0] else []), *block, ctx.head)
        upto = None if block[-1] == ctx.units[-1] else block[-1]
        out.append(Phase(f"block{j + 1}", live=live, upto=upto, carry=j + 1 < len(blocks)))
    return tuple(out)


def plan(ctx: PlanCtx) -> Plan | None:
    def build(blocks: Sequence[tuple[str, ...]]) -> Plan:
        return Plan(phases=phases(ctx, blocks))

    if ctx.h["blocks"] == "bytes":
        return ctx.fewest(build)
    if ctx.h["blocks"] != "paper":
        raise FedpipeError(f"methods.fedepth.blocks: {ctx.h['blocks']!r}; wanted bytes or paper")
    blocks, unfit = ctx.greedy()
    return build(blocks) if blocks and not unfit else None


method = Method(name="fedepth", h={"blocks": "bytes"}, plan=plan)
