"""Which phases keep the output of their frozen prefix: all that may, as far as the client's budget holds it."""

from dataclasses import replace
from typing import TYPE_CHECKING

from fedpipe.memory.margin import without_margin
from fedpipe.models import traits
from fedpipe.plans import trained_units
from fedpipe.types import Phase, Plan, Row

if TYPE_CHECKING:
    from fedpipe.runtime import Runtime

MOST = 1 << 30  # bytes kept where there is no budget


def keeping(rt: "Runtime", plan: Plan, row: Row, samples: int) -> Plan:
    """The plan, in which each phase keeps the output of its frozen prefix where that is exact and fits.

    samples: for how many there must be room. Clients with equal budgets are to have one plan, so it is not the row's.
    """
    local, method = rt.run.local, rt.method
    if local.prefix == "run" or local.batches != "fixed" or method.direction or method.draw:  # which may read images
        return plan
    peaks, phases, before = rt.predictor.peaks(plan), list[Phase](), 0
    limit = None if row.budget is None else without_margin(row.budget, rt.run.margin)
    for phase, peak in zip(plan.phases, peaks, strict=True):
        passes = phase.epochs or local.epochs if phase.steps is None else phase.steps
        plain = (passes > 1 or len(plan.phases) > 1) and not method.loss_in(phase)
        since = _since(rt, plan, phase) if plain else None
        kept = replace(phase, since=since, kept=samples) if since else phase
        size = rt.predictor.kept_bytes(plan, kept)
        fits = size <= MOST if limit is None else peak + max(size, before) <= limit
        phases.append(kept if fits else phase)
        before = size if fits else 0
    return replace(plan, phases=tuple(phases))


def _since(rt: "Runtime", plan: Plan, phase: Phase) -> str | None:
    """The last unit before the first that trains, if its output is the same whenever it is made."""
    chain = rt.chain(plan)
    trained = trained_units(phase, chain.names, chain.tensor_names)
    body = chain.run_units(phase.upto)[:-1]
    frozen = body[: min((body.index(u) for u in trained if u in body), default=len(body))]
    if not frozen or phase.data != "train":
        return None
    units = [chain.get_submodule(u) for u in frozen]
    if not any(True for u in units for _ in u.parameters()):
        return None  # nothing to run
    own = any(n.split(".")[0] in frozen for n in (*chain.buffer_names, *chain.noise.layers, *traits.drawing(chain)))
    crossing = any(a in frozen and b not in frozen for a, b in phase.again)
    return None if own or crossing else frozen[-1]
