"""The bytes and the work of a unit's captured step, run under fake tensors."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.multiprocessing.reductions import StorageWeakRef

from fedpipe.loop.lower import arg
from fedpipe.loop.straight import straight
from fedpipe.memory.predict import Span, Trace, tensor_bytes
from fedpipe.memory.script import Script
from fedpipe.memory.unit import Pass, Still, Work


class _Watch:
    """Called from within a script: where its forward begins, where its result is read, where its backward begins."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.before = trace, trace.now
        self.spans = self._spans()
        self.seen: dict[str, tuple[StorageWeakRef, int]] = {}

    def _spans(self) -> Iterator[Span]:
        """A span from one call to the next."""
        while True:
            with self.trace.span({}) as span:
                yield span

    def start(self, *x: Tensor) -> None:
        for t in x:
            self.seen["x"] = StorageWeakRef(t.untyped_storage()), tensor_bytes([t])
        self.held = self.trace.now - self.before - self.size("x")  # the gradient, where it comes before
        self.forward = next(self.spans)

    def read(self, y: Tensor) -> None:
        self.seen["y"] = StorageWeakRef(y.untyped_storage()), tensor_bytes([y])

    def turn(self) -> None:
        self.now = self.trace.now - self.before
        self.kept = {n for n, (ref, _) in self.seen.items() if not ref.expired()}
        if self.kept == {"x", "y"} and self.seen["x"][0] == self.seen["y"][0]:
            self.kept = {"y"}
        self.backward = next(self.spans)

    def size(self, name: str) -> int:
        return self.seen[name][1] if name in self.seen else 0

    @property
    def rise(self) -> int:
        """Of the forward, the input included."""
        return self.size("x") + self.forward.bytes

    def passed(self, gradients: int, work: float) -> Pass:
        x, y = "x" in self.kept, "y" in self.kept
        own = x * self.size("x")
        saved = self.now - self.held - own - y * self.size("y")
        return Pass(saved, x, y, self.rise, self.now + self.backward.bytes - own, gradients, work)


def trained(script: Script, kept: bool = False) -> Pass:
    """Run a unit's forward and backward. kept: its input is kept elsewhere till the end."""
    return _run(script, kept)[0]


def still(script: Script, kept: bool = False) -> Still:
    """Run a unit's forward alone."""
    return _run(script, kept)[1]


def _run(script: Script, kept: bool) -> tuple[Pass, Still]:
    graph, device = copy.deepcopy(script.graph), script.x.device
    with Trace(device) as trace, Work() as work:
        at = [*trace.fake(script.at).values(), torch.empty(0, device=device)]
        at += trace.fake({n: script.at[n] for n in script.momentum}).values()
        watch = _Watch(trace)
        _watched(graph, script, watch, kept)
        step, work.done = straight(graph), 0.0
        out = step(*at, -0.1, 1.0)
        watch.spans.close()  # type: ignore[attr-defined]
        before = (script.kind in ("loss", "still")) + bool(script.back)
        gradients = tensor_bytes(out[before : before + script.gradients])
    return watch.passed(gradients, work.done), Still(watch.rise, work.done, script.y)


def _watched(graph: Graph, script: Script, watch: _Watch, kept: bool) -> None:
    """Put the watch into a graph, and make its result what is to be alive at its end."""
    output = next(iter(reversed(graph.nodes)))
    results, start = [*arg(output)], _role(graph, "x")
    y = None if script.kind in ("loss", "still") else results.pop(0)
    output.args = ((*results, *([start] if kept and start else [])),)
    if script.kind == "end":
        graph.eliminate_dead_code()
        start = _role(graph, "x")
    for name, like in (("x", script.x), ("g", script.g)):
        if (node := _role(graph, name)) and like and not like.own:
            _hidden(graph, node)
    calls = [n for n in graph.nodes if n.op != "placeholder"]
    with graph.inserting_after(start) if start else graph.inserting_before(calls[0]):
        _call(graph, watch.start, *([start] if start else []))
    with graph.inserting_before(next(n for n in calls if n.meta.get("stage") != "forward")):
        if y is not None and script.kind != "end":
            _call(graph, watch.read, y)
        _call(graph, watch.turn)


def _role(graph: Graph, name: str) -> Node | None:
    """The node of this role; None where nothing reads it."""
    return next((n for n in graph.nodes if n.meta.get("role") == name), None)


def _hidden(graph: Graph, node: Node) -> None:
    """Put a view in the place of a node, so that nothing writes over it."""
    with graph.inserting_after(node):
        view = graph.call_function(torch.ops.aten.alias.default, (node,))
    view.meta |= {"val": node.meta["val"], "stage": node.meta.get("stage")}
    node.replace_all_uses_with(view, delete_user_cb=lambda user: user is not view)


def _call(graph: Graph, fn: object, *given: Node) -> None:
    graph.call_function(fn, given).meta["stage"] = "forward"  # type: ignore[arg-type]
