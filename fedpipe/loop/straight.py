"""A graph of operations as a function: straight-line code, or what torch's inductor makes of it."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fedpipe.loop.lower import in_place


class Stage:
    """Which part of a captured step runs, "forward" or "backward"; None outside. Traces of memory ask for it."""

    now: str | None = None


def straight(graph: Graph) -> Callable[..., Any]:
    """A function that runs a graph's operations one after another and forgets each value after its last use."""
    in_place(graph)
    names: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan, "stage": Stage}
    given = [n.name for n in graph.nodes if n.op == "placeholder"]
    lines, done, now = [], _last_uses(graph), None
    for i, node in enumerate(graph.nodes):
        args = [repr(map_arg(a, _Name)) for a in node.args]
        args += [f"{k}={map_arg(a, _Name)!r}" for k, a in node.kwargs.items()]
        if node.op == "output":
            lines.append(f"return {args[0]}")
        elif node.op == "call_function":
            if (stage := node.meta.get("stage", "backward")) != now:
                lines.append(f"stage.now = {(now := stage)!r}")
            names[f"op{i}"] = getattr(node.target, "_op", node.target)  # without the detour of `torch.ops`
            gone = "".join(f"{n} = " for n in done[node])
            lines.append(f"{node.name} = op{i}({', '.join(args)})" + (f"; {gone}None" if gone else ""))
    source = f"def run({', '.join(given)}):\n    " + "\n    ".join(lines)
    exec(compile(source, "<a captured step>", "exec"), names)  # of nothing but calls of torch's operations
    run: Callable[..., Any] = names["run"]
    run.__doc__ = source
    return run


class _Name(str):
    """A node in an argument, as its name."""

    def __new__(cls, node: Node) -> "_Name":
        return super().__new__(cls, node.name)

    def __repr__(self) -> str:
        return str(self)


def _last_uses(graph: Graph) -> dict[Node, list[str]]:
    """By node the names that nothing reads after it, its own among them where nobody does."""
    seen, out = set[Node](), dict[Node, list[str]]()
    for node in reversed(graph.nodes):
        out[node] = [n.name for n in dict.fromkeys((node, *node.all_input_nodes)) if n not in seen]
        seen |= {node, *node.all_input_nodes}
    return out


class Compiled:
    """A graph compiled by torch's inductor at its first call; `seconds` is what that took."""

    def __init__(self, module: GraphModule, graph: Graph):
        _scaled(graph)
        self.run: Callable[..., Any] = torch.compile(GraphModule(module, graph), dynamic=False)
        self.seconds = 0.0

    def __call__(self, *given: Any) -> Any:
        if self.seconds:
            return self.run(*given)
        begin = time.perf_counter()
        out = self.run(*given)
        self.seconds = time.perf_counter() - begin
        return out


def _scaled(graph: Graph) -> None:
    """Scale what is added before it is: inductor (of torch 2.13) takes a product and its addition for one operation,
    and forgets an `alpha` that is no constant."""
    aten = torch.ops.aten
    products = {aten.addmm_.default: aten.mm.default, aten.baddbmm_.default: aten.bmm.default}
    for node in list(graph.nodes):
        if not isinstance(alpha := node.kwargs.get("alpha"), Node):
            continue
        with graph.inserting_before(node):
            what = node.args[1]
            if node.target in products:
                what = graph.call_function(products[node.target], node.args[1:])
                if (beta := node.kwargs.get("beta")) is not None:
                    graph.call_function(aten.mul_.Tensor, (node.args[0], beta))
            scaled = graph.call_function(aten.mul.Tensor, (what, alpha))
        node.target, node.args, node.kwargs = aten.add_.Tensor, (node.args[0], scaled), {}
