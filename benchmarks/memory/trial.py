"""A plan, predicted and tried: two real batches of every phase, by the loop that trains."""

from typing import Any

import numpy as np
import torch
from cases import Case

from fedpipe.config import Study
from fedpipe.data.dataset import Dataset
from fedpipe.loop.capture import PROGRAMS
from fedpipe.memory.trial import tried
from fedpipe.methods import fedepth
from fedpipe.runtime import Runtime
from fedpipe.types import Plan, Row

SHAPE, CLASSES = (3, 32, 32), 10


def images(count: int) -> Dataset:
    """Noise with labels: no count of bytes depends on what is on an image."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=gen)
    y = torch.randint(0, CLASSES, (count,), generator=gen)
    names = tuple(map(str, range(CLASSES)))
    return Dataset(x, y, np.zeros(count, dtype=np.bool_), SHAPE, CLASSES, names, (0.5,) * 3, (0.25,) * 3)


def opened(case: Case, device: str = "cpu") -> tuple[Runtime, Plan]:
    """A case's study, and its plan as the method makes it without a limit; FeDepth's of the blocks that are given."""
    (run,) = Study.model_validate({**case.study, "device": device}).runs()
    rt = Runtime(run, images(case.batch))
    ctx = rt.plan_ctx(Row(budget=None, samples=case.batch))
    if case.blocks:
        plan: Plan | None = Plan(
            phases=fedepth.phases(ctx, [ctx.units[first - 1 : last] for first, last in case.blocks])
        )
    else:
        plan = rt.method.plan(ctx) if rt.method.plan else Plan()
    assert plan is not None
    return rt, rt.levelled(plan)


def rows(case: Case, device: str = "cpu") -> list[dict[str, Any]]:
    """A row per phase: the units it trains, its predicted and measured bytes, and the prediction's relative error."""
    rt, plan = opened(case, device)
    predicted = rt.predictor.peaks(plan)
    found = [p.bytes for p in tried(rt, plan, torch.arange(case.batch))]
    PROGRAMS.known.clear()  # of hundreds of models
    return [
        case.about | {"units": units, "predicted": p, "measured": m, "error": p / m - 1}
        for units, p, m in zip(case.trained, predicted, found, strict=True)
    ]
