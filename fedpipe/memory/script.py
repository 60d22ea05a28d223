"""A unit's captured step, alone: its forward and backward are written down as a whole step's are
(`fedpipe.loop.capture`), between an input that comes from before it and a gradient that comes from behind."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fedpipe.loop.capture import mark, trace
from fedpipe.loop.lower import Sgd, arg, fresh, lower
from fedpipe.memory.unit import Run, Sample
from fedpipe.types import Tensors

# plain: a unit before others; loss: its result is the loss; again: one that runs again in the backward, before others;
# end: the last of these, whose result nobody reads the second time; still: one without a backward
Kind = Literal["plain", "loss", "again", "end", "still"]
AGAIN = "again", "end"


@dataclass(frozen=True)
class Script:
    """A unit's operations. What comes from outside has a role in its node's meta: x, and g, the gradient of y.

    Results are the unit's, `back` if there is one, and `gradients`, as many as have not moved anything. momentum: the
    live tensors that have a buffer.
    """

    kind: Kind
    graph: Graph
    at: Tensors
    momentum: tuple[str, ...]
    x: Sample
    g: Sample | None
    y: Sample
    back: Sample | None  # the gradient of x
    gradients: int


def written(run: Run, at: Tensors, live: tuple[str, ...], x: Sample, g: Sample | None = None, deep: bool = False,
            kind: Kind = "still", sgd: Sgd | None = None, buffers: tuple[str, ...] = ()) -> Script:  # fmt: skip
    """run(at, x), with its backward to `live` and, if deep, to x; with `sgd` live tensors move within.

    What runs again changes its buffers in copies. Raises NotCaptured.
    """
    reached: list[str] = []

    def flat(*given: Tensor) -> list[Tensor]:
        y, found = _both(run, dict(zip(at, given, strict=False)), live, x, g, deep, kind, buffers)
        reached[:] = found
        return [y.detach(), *found.values()]

    slots = [at[n] for n in live] if sgd and sgd.momentum else []
    graph = trace(flat, [*at.values(), torch.empty(0), *slots]).graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    place = dict(zip((*at, "", *(f"slot {n}" for n in live)), inputs, strict=False))
    leaves = [(place[n], place.get(f"slot {n}")) for n in reached if n]
    lower(graph, sgd, leaves)
    y, *rest = (_sample(n, x.device) for n in arg(next(iter(reversed(graph.nodes)))))
    back = rest.pop(0) if "" in reached else None
    return Script(kind, graph, at, live if slots else (), x, g, y, back, len(rest))


def _sample(node: Node, device: str) -> Sample:
    value: Tensor = node.meta["val"]
    return Sample(tuple(value.shape), value.stride(), value.dtype, device, fresh(node))


def _both(run: Run, at: Tensors, live: tuple[str, ...], x: Sample, g: Sample | None, deep: bool,
          kind: Kind, buffers: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Result and gradients by name, "" the input's."""
    grad = _role("g", g) if kind == "end" and g else None
    z = _role("x", x)
    wanted = {**({"": z} if deep else {}), **{n: at[n].detach() for n in live}}
    pull: Any = None

    def forward(*chosen: Tensor) -> Tensor:
        here = dict(zip(wanted, chosen, strict=True))
        fixed = {n: t.clone() for n, t in at.items() if n in buffers} if kind in AGAIN else {}
        return run({**at, **fixed, **{n: t for n, t in here.items() if n}}, here.get("", z))

    with torch.enable_grad():
        if kind in AGAIN and wanted:
            y, pull, *_ = torch.func.vjp(forward, *wanted.values())
        else:
            y = forward(*(t.requires_grad_(kind != "still") for t in wanted.values()))
        mark()
        if pull is None and not y.requires_grad:
            return y, {}
        if kind == "loss":
            found = torch.autograd.grad(y.sum(), list(wanted.values()), allow_unused=True)
        else:
            assert g is not None
            grad = _role("g", g) if grad is None else grad
            found = pull(grad) if pull else torch.autograd.grad(y, list(wanted.values()), grad, allow_unused=True)
    return y, {n: t for n, t in zip(wanted, found, strict=True) if t is not None}


def _role(name: str, like: Sample) -> Tensor:
    """A tensor that comes from outside."""
    t = like.made()
    mode = get_proxy_mode()
    assert mode is not None
    next(iter(reversed(mode.tracer.graph.nodes))).meta["role"] = name
    return t
