"""A step captured: its operations written down once, by shapes, and run again for every batch without autograd, vmap
or modules around them. What is captured is the contract's own step, so every method gains and none knows of it."""

import copy
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._python_dispatch import _disable_current_modes

from fedpipe.context import Ctx
from fedpipe.loop.localstep import LocalStep, Outcome
from fedpipe.loop.lower import Sgd, lower
from fedpipe.loop.replay import Arena
from fedpipe.loop.straight import Compiled, Stage, straight
from fedpipe.tracing import fake_mode
from fedpipe.types import Batch, Tensors

PATIENCE = 32  # steps
KEYED = ("chain", "phase")  # of a context: what every program is kept by


@dataclass(frozen=True)
class Seen(Ctx):
    """A context that notes which of its facts are read: a program holds them as constants."""

    read: set[str] = field(default_factory=set, repr=False)

    def __getattribute__(self, name: str) -> Any:
        if name in FACTS:
            object.__getattribute__(self, "read").add(name)
        return object.__getattribute__(self, name)


FACTS = {f.name for f in fields(Ctx)} - {*KEYED}


def watched(ctx: Ctx) -> Seen:
    return Seen(**{f.name: getattr(ctx, f.name) for f in fields(Ctx)})


class NotCaptured(Exception):
    """A step that cannot be written down: it looks at values of tensors, or brings tensors of its own."""


@dataclass
class Program:
    """A captured step. `facts` are what it has read of its context; `moves` whether it moves the leaves itself."""

    inputs: tuple[str, ...]
    batch: tuple[str, ...]
    changed: tuple[str, ...]
    direction: tuple[str, ...]
    facts: dict[str, Any]
    moves: bool
    run: Callable[..., Any]
    silent: Callable[..., Any]  # the same without the value
    fast: list[Compiled]  # both compiled, where the study wants that

    def __call__(self, at: Tensors, batch: Batch, buffers: Tensors, scales: tuple[float, float],
                 value: bool, arena: Arena | None = None) -> Outcome:  # fmt: skip
        """One step. buffers: momentum by live name, moved in place as the leaves are; scales: -lr and 1 - lr decay;
        arena: where leaves and buffers lie, for the step to be replayed there."""
        given = [*(at[n] for n in self.inputs), *(batch[n] for n in self.batch), *buffers.values()]
        if self.fast and not isinstance(given[0], FakeTensor):
            run: Callable[..., Any] = self.fast[0 if value else 1]
        else:
            run = self.run if value else self.silent
        try:
            out = arena.run(run, given, scales) if arena and not self.fast else [*run(*given, *scales)]
        finally:
            Stage.now = None
        first = out.pop(0) if value else None
        if not out:
            return first, {}, {}
        cut = len(self.changed)
        changed = dict(zip(self.changed, out[:cut], strict=True))
        return first, changed, dict(zip(self.direction, out[cut:], strict=True))


class Programs:
    """Captured steps of a process by what they depend on."""

    def __init__(self, compiled: bool = False) -> None:
        self.compiled, self._captured = compiled, 0.0
        self._waits: dict[Hashable, int] = {}
        self.known: dict[Hashable, list[Program | None]] = {}

    def due(self, key: Hashable, step: LocalStep, batch: Batch) -> bool:
        """Whether a step has run so often that writing it down pays: jobs of a round may end before."""
        whole = (key, step.live, step.still, step.stacked, _signature(batch))
        self._waits[whole] = self._waits.get(whole, 0) + 1
        return self.compiled or self._waits[whole] > PATIENCE

    def find(self, key: Hashable, step: LocalStep, at: Tensors, buffers: Tensors, batch: Batch, ctx: Ctx,
             sgd: Sgd | None) -> Program | None:  # fmt: skip
        """The program of a step, captured where it is not known; None where it cannot be captured."""
        hooks = step.loss, step.method.direction
        whole = (key, hooks, step.live, step.still, step.stacked, sgd, bool(buffers), _signature(at), _signature(batch))
        known = self.known.setdefault(whole, [])
        for program in known:
            if program is None or all(getattr(ctx, n) == v for n, v in program.facts.items()):
                return program
        begin = time.perf_counter()
        try:
            known.append(_capture(step, at, buffers, batch, ctx, sgd, self.compiled))
        except NotCaptured:
            known.append(None)
        self._captured += time.perf_counter() - begin
        return known[-1]

    @property
    def seconds(self) -> float:
        """What capturing, and compiling where that is wanted, has taken so far."""
        fast = (f.seconds for known in self.known.values() for p in known if p for f in p.fast)
        return self._captured + sum(fast)


PROGRAMS = Programs()  # of this process: a step of a study that is run in segments is captured once


@cache
def programs(compiled: bool) -> Programs:
    """All captured steps of this process, or those that are compiled."""
    return Programs(True) if compiled else PROGRAMS


def _signature(tensors: Tensors) -> tuple[Any, ...]:
    return tuple((n, t.shape, t.stride(), t.dtype) for n, t in tensors.items())


def _capture(step: LocalStep, at: Tensors, buffers: Tensors, batch: Batch, ctx: Ctx, sgd: Sgd | None,
             compiled: bool) -> Program:  # fmt: skip
    seen, names = watched(ctx), tuple(at)
    step = LocalStep(step.method, step.loss, step.live, step.still, step.stacked, turn=mark)
    parts: dict[str, tuple[str, ...]] = {}

    def flat(*given: Tensor) -> list[Tensor]:
        here = dict(zip((*names, *batch), given[: len(names) + len(batch)], strict=True))
        value, changed, d = step({n: here[n] for n in names}, {n: here[n] for n in batch}, seen)
        parts.update(changed=tuple(changed), direction=tuple(d))
        assert value is not None
        return [value, *changed.values(), *d.values()]

    module = trace(flat, [*at.values(), *batch.values(), *buffers.values()])
    changed, d = parts["changed"], parts["direction"]
    graph = module.graph
    inputs: list[Node] = [n for n in graph.nodes if n.op == "placeholder"]
    moves = sgd is not None and set(d) <= {*step.live, *step.still}
    place = {n: inputs[i] for i, n in enumerate(names)}
    slots = dict(zip(buffers, inputs[len(names) + len(batch) :], strict=True))
    leaves = [(place[n], slots.get(n)) for n in d]
    lower(graph, sgd if moves else None, leaves)
    graphs = [graph, _without_first(graph)]
    fast = [Compiled(module, copy.deepcopy(g)) for g in graphs] if compiled else []
    run, silent = map(straight, graphs)
    facts = {n: getattr(ctx, n) for n in seen.read}
    return Program(names, tuple(batch), changed, () if moves else d, facts, moves, run, silent, fast)


def mark() -> None:
    """Mark all nodes so far as those of the forward."""
    mode = get_proxy_mode()
    for node in mode.tracer.graph.nodes if mode else ():
        node.meta.setdefault("stage", "forward")


def _without_first(graph: Graph) -> Graph:
    """The graph without its first result."""
    out = copy.deepcopy(graph)
    node = next(n for n in out.nodes if n.op == "output")
    node.args = (node.args[0][1:],)
    out.eliminate_dead_code()
    return out


def trace(fn: Callable[..., Any], tensors: list[Tensor]) -> GraphModule:
    """The operations of fn on tensors like these, of which no value is looked at. Raises NotCaptured."""
    with _disable_current_modes(), torch.no_grad(), fake_mode():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors]
        try:
            module = make_fx(fn, _allow_non_fake_inputs=True)(*fakes)
        except Exception as e:
            raise NotCaptured(str(e)) from e
    if own := [n for n in module.graph.nodes if n.op == "get_attr"]:
        raise NotCaptured(f"a tensor of its own, {own[0].target}")
    return module
