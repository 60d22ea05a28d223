"""Evaluation of states: pooled over all test rows, and through each client's eyes."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpipe.context import Ctx
from fedpipe.loop.client import default_begin
from fedpipe.loop.prefix import laid
from fedpipe.runtime import Runtime
from fedpipe.seeding import seeded
from fedpipe.types import Batch, Row, Tensors


def default_predict(at: Tensors, batch: Batch, ctx: Ctx) -> Tensors:
    """`global`: the received model; `personal`: the working model, where a method ends up with another."""
    out = {"global": ctx.apply(at, batch["x"], "in/model/")}
    if any(t is not at[f"in/{n}"] for n, t in at.items() if n.startswith("model/")):
        out["personal"] = ctx.apply(at, batch["x"])
    return out


def scores(rt: Runtime, at: Tensors, rows: Tensor, ctx: Ctx, train: Tensor) -> dict[str, tuple[float, float]]:
    """Mean loss and accuracy of each predicted column over rows [n], batch by batch; train: rows that the statistics of
    batch norms are of, where the study wants these."""
    predict = rt.method.predict or default_predict
    total: dict[str, np.ndarray] = {}
    layout = rt.layout(ctx.chain or rt.build())

    def batches(rows: Tensor) -> Iterator[Batch]:
        return (laid(rt.feed.load(part.numpy(), len(part)), layout) for part in rows.split(rt.evaluated_at_once))

    with torch.no_grad(), seeded(0), rt.statistics.applied() if rt.statistics else nullcontext():
        if rt.statistics and len(train):
            rt.statistics.estimate(lambda batch: predict(at, batch, ctx), batches(train))
        for batch in batches(rows):
            for column, z in predict(at, batch, ctx).items():
                loss = torch.nn.functional.cross_entropy(z.double(), batch["y"], reduction="sum")
                right = (z.argmax(1) == batch["y"]).sum()
                total[column] = total.get(column, np.zeros(2)) + np.array([float(loss), float(right)])
    return {c: (float(s[0] / len(rows)), float(s[1] / len(rows))) for c, s in total.items()}


def pooled(rt: Runtime, state: Tensors, rows: Tensor, train: Tensor) -> tuple[float, float]:
    """Loss and accuracy of a state's model over the pooled test rows [n]; train: all training rows."""
    if rt.statistics:
        rt.statistics.known.clear()  # of the states before
    at = rt.moved({f"in/{n}": t for n, t in state.items()})
    at |= default_begin(at, rt.ctx(role="eval"))
    return scores(rt, at, rows, _eval_ctx(rt), train)["global"]


def _eval_ctx(rt: Runtime, client: int | None = None) -> Ctx:
    return replace(rt.ctx(rt.run.rounds, client, role="eval"), chain=rt.build())


def client_scores(
    rt: Runtime, state: Tensors, own: Tensors, client: int, row: Row, train: Tensor, test: Tensor
) -> dict[str, tuple[float, float]]:
    """Loss and accuracy of each column on a client's own test rows [m], after its `finish` plan on its rows [n].

    At evaluation a client opens the whole state as `in/*`, and what it kept; `begin` makes its working model.
    """
    ctx = _eval_ctx(rt, client)
    at = rt.moved({**{f"in/{n}": t for n, t in state.items()}, **own})
    plan = rt.method.finish(rt.plan_ctx(row)) if rt.method.finish else None
    plan = rt.levelled(plan) if plan else None
    if plan is not None and len(train):
        at |= rt.loop().train([rt.client(ctx, at, train)], plan)[0].at
    else:
        at |= (rt.method.begin or default_begin)(at, ctx)
    return scores(rt, at, test, ctx, train)


def columns(found: dict[str, tuple[float, float]], client: int | None, samples: int) -> Iterator[dict[str, Any]]:
    """Rows of `metrics.parquet`."""
    for column, (loss, accuracy) in found.items():
        yield {"client": client, "column": column, "loss": loss, "accuracy": accuracy, "samples": samples}
