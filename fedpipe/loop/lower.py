"""A captured step made lean: a graph of ATen operations in which nothing is done twice, and weights move where their
gradient is made. Every rule looks at shapes and operations alone, so that equal studies give equal bits."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten
LARGE = 1 << 19  # bytes of a linear layer's gradient from which on it is added to the weight without being made
IN_PLACE: dict[Any, Any] = {
    aten.relu.default: aten.relu_.default,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.div.Scalar: aten.div_.Scalar,
    aten.add.Tensor: aten.add_.Tensor,
    aten.neg.default: aten.neg_.default,
}
PRODUCTS: dict[Any, Any] = {aten.mm.default: aten.addmm_.default, aten.bmm.default: aten.baddbmm_.default}
TURNS = (aten.t.default, aten.transpose.int)


@dataclass(frozen=True)
class Sgd:
    """x <- x - lr (g + decay x), with momentum m <- momentum m + g + decay x and m for g: torch.optim.SGD's rule."""

    momentum: float
    decay: float

    def move(self, leaf: Tensor, d: Tensor, buffer: Tensor | None, lr: float) -> None:
        """One leaf, in place, as a captured step moves it."""
        g = d.add(leaf, alpha=self.decay) if self.decay else d
        if buffer is not None:
            g = buffer.mul_(self.momentum).add_(g)
        leaf.add_(g, alpha=-lr)


def lower(graph: Graph, sgd: Sgd | None, leaves: list[tuple[Node, Node | None]]) -> None:
    """Clean a captured graph; with `sgd`, move each leaf in place by its gradient.

    leaves: placeholders of a leaf and of its momentum buffer if any, in the order of their gradients, which are the
    last results, and none any more where they moved. Two placeholders are added at the end, -lr and 1 - lr decay.
    """
    scales = _scales(graph)
    _forward_views(graph)
    _uniform(graph)
    graph.eliminate_dead_code()
    if sgd is not None:
        place = {n: i for i, n in enumerate(graph.nodes)}
        output = next(iter(reversed(graph.nodes)))
        results = arg(output)
        cut = len(results) - len(leaves)
        for (leaf, buffer), grad in zip(leaves, results[cut:], strict=True):
            _move(graph, sgd, leaf, grad, buffer, scales, place)
        output.args = (results[:cut],)
    graph.eliminate_dead_code()


def _scales(graph: Graph) -> tuple[Node, Node]:
    last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
    with graph.inserting_after(last):
        down = graph.placeholder("down")
    with graph.inserting_after(down):
        return down, graph.placeholder("shrink")


def arg(node: Node, i: int = 0) -> Any:
    return node.args[i]


def _same(a: Node, b: Node) -> bool:
    """Whether two nodes are known to be tensors of one shape, layout and type."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return False
    return x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


def is_view(node: Node) -> bool:
    """Whether an operation's result is a view of an argument."""
    schema = getattr(node.target, "_schema", None)
    if node.target is aten._unsafe_view.default:
        return True
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _forward_views(graph: Graph) -> None:
    """Users of a view that changes nothing take what it views; two turns in a row are none."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if (
            is_view(node)
            and _same(node, arg(node))
            or node.target is aten.mul.Scalar
            and node.args[1] == 1
            and _same(node, arg(node))
        ):
            node.replace_all_uses_with(arg(node))
        elif node.target in TURNS and arg(node).target is node.target:
            inner = arg(node)
            if node.args[1:] == inner.args[1:] and _same(node, arg(inner)):
                node.replace_all_uses_with(arg(inner))


def _uniform(graph: Graph) -> None:
    """What a product with ones, or their negative, is: backward passes start from them."""
    known: dict[Node, float] = {}  # nodes whose entries all are 1 or -1
    for node in graph.nodes:
        first = arg(node) if node.args and isinstance(arg(node), Node) else None
        if node.target is aten.ones_like.default:
            known[node] = 1
        elif node.target is aten.neg.default and first in known:
            known[node] = -known[first]
        elif is_view(node) and first in known:
            known[node] = known[first]
        elif node.target is aten.mul.Tensor:
            for sign, other in ((arg(node), node.args[1]), (node.args[1], arg(node))):
                if sign in known and isinstance(other, Node) and _same_shape(other, node):
                    if known[sign] == 1:
                        node.replace_all_uses_with(other)
                    else:
                        node.target, node.args = aten.neg.default, (other,)
                    break


def _same_shape(a: Node, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype


def _aliases(node: Node) -> bool:
    """Whether a result shares memory with an argument: a view of it, or the argument written over."""
    schema = getattr(node.target, "_schema", None)
    return is_view(node) or (schema is not None and any(r.alias_info is not None for r in schema.returns))


def _users(node: Node) -> Iterable[Node]:
    """What reads a node's memory: its users, and those of what shares it."""
    for user in node.users:
        yield user
        if _aliases(user) or user.target is getitem:
            yield from _users(user)


def _move(graph: Graph, sgd: Sgd, leaf: Node, grad: Node, buffer: Node | None, scales: tuple[Node, Node],
          place: dict[Node, int]) -> None:  # fmt: skip
    """x <- x - lr g as soon as g is made and nothing reads x any more."""
    down, shrink = scales
    after = max([grad, *_users(leaf)], key=lambda n: place.get(n, -1) if n.op != "output" else -1)
    product = _product(leaf, grad)
    made = _Chain(graph, after)
    if product is not None:
        move, left, right = product[0], *(made.turned(x) for x in product[1:])
    if product is not None and buffer is not None:
        made.add(move, buffer, left, right, beta=sgd.momentum)
        if sgd.decay:
            made.add(aten.add_.Tensor, buffer, leaf, alpha=sgd.decay)
        made.add(aten.add_.Tensor, leaf, buffer, alpha=down)
    elif product is not None:
        kept = {"beta": shrink} if sgd.decay else {}
        made.add(move, leaf, left, right, **kept, alpha=down)
    else:
        g = made.add(aten.add.Tensor, grad, leaf, alpha=sgd.decay) if sgd.decay else grad
        if buffer is not None:
            made.add(aten.mul_.Tensor, buffer, sgd.momentum)
            made.add(aten.add_.Tensor, buffer, g)
        made.add(aten.add_.Tensor, leaf, g if buffer is None else buffer, alpha=down)


class _Chain:
    """Nodes one after another, behind a given one."""

    def __init__(self, graph: Graph, after: Node):
        self.graph, self.after = graph, after

    def add(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_after(self.after):
            self.after = self.graph.call_function(target, args, kwargs)
        return self.after

    def turned(self, x: "Node | _Turned") -> Node:
        """The node itself, or turned around in its last two dimensions."""
        return self.add(aten.transpose.int, x.of, -2, -1) if isinstance(x, _Turned) else x


def _product(leaf: Node, grad: Node) -> tuple[Any, Any, Any] | None:
    """(in-place product, left, right) where the gradient is a large matrix product nobody else reads."""
    value: Tensor = grad.meta["val"]
    if value.numel() * value.element_size() < LARGE or not leaf.meta["val"].is_contiguous():
        return None
    turned = grad.target in TURNS
    product: Node = arg(grad) if turned else grad
    if product.target not in PRODUCTS or len(product.users) > 1 or len(grad.users) > 1:
        return None
    left, right = arg(product), arg(product, 1)
    if not turned:
        return PRODUCTS[product.target], left, right
    return PRODUCTS[product.target], _Turned(right), _Turned(left)


@dataclass(frozen=True)
class _Turned:
    of: Node


def in_place(graph: Graph) -> None:
    """Elementwise operations write over an argument that nothing reads after them."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    for node in graph.nodes:
        threshold = node.target is aten.threshold_backward.default
        if not threshold and node.target not in IN_PLACE:
            continue
        first = arg(node)
        if not isinstance(first, Node) or not fresh(first) or not _same(first, node):
            continue
        if any(place[u] > place[node] for u in _users(first) if u is not node):
            continue
        if threshold:
            node.target, node.kwargs = aten.threshold_backward.grad_input, {"grad_input": first}
        else:
            node.target = IN_PLACE[node.target]


def fresh(node: Node) -> bool:
    """Whether a node is the only name of memory that an operation has made."""
    if node.op != "call_function" or is_view(node):
        return False
    if node.target is getitem or node.target in IN_PLACE.values():
        return fresh(arg(node))
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable
