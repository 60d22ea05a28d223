"""FedRolex. Alam, Liu, Yan and Zhang, NeurIPS 2022. https://arxiv.org/abs/2212.01548

As HeteroFL, but the channels that a client trains move: in round t (from 0) its window of a layer with C channels
begins at channel -t mod C and wraps round, so that every entry is trained in turn. The server takes the unweighted mean
of an entry over the clients that hold it; one that nobody holds stays. (The published code counts clients of a round
twice in some weights; this is the paper's plain mean.) Full width is FedAvg (uniform).
"""

from dataclasses import replace

from fedpipe.methods import heterofl
from fedpipe.planning import PlanCtx
from fedpipe.types import Plan


def plan(ctx: PlanCtx) -> Plan | None:
    found = heterofl.plan(ctx)
    return found and replace(found, index=ctx.rolled(found.index, -ctx.round))


method = replace(heterofl.method, name="fedrolex", by_round=True, plan=plan)
