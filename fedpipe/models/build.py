"""Networks by name or from a user's file, built as chains, whole or in part."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fedpipe.config import ModelSpec
from fedpipe.errors import FedpipeError
from fedpipe.models import REGISTRY
from fedpipe.models.chain import Chain, Shape
from fedpipe.types import Window
from fedpipe.userfile import load_attribute


def builder(name: str) -> Callable[..., Any]:
    if name in REGISTRY:
        module, _, function = REGISTRY[name].partition(":")
        return getattr(importlib.import_module(module), function)
    if ".py" not in name:
        raise FedpipeError(f"model {name}: unknown; known are {', '.join(sorted(REGISTRY))}, or ./file.py:function")
    found = load_attribute(name, "function")
    if not callable(found):
        raise FedpipeError(f"model {name}: wanted a function (shape, classes, ...), found {type(found).__name__}")
    return found


def without(chain: Chain, skip: Sequence[str]) -> Chain:
    """A chain of the same modules but for some units, whose input goes on to those behind them. Raises FedpipeError
    where these do not take it."""
    rest = [n for n in chain.names if n not in skip]
    exits = {u: chain.get_submodule(h) for u, h in chain.heads.items() if u in rest}
    try:
        return Chain([(n, chain.get_submodule(n)) for n in rest], chain.shape, exits)
    except FedpipeError as e:
        raise FedpipeError(f"units {', '.join(skip)} cannot be left out: {e}") from e


def upto(chain: Chain, depth: int, inner: bool) -> Chain:
    """A chain of the same modules whose last unit before the head is the depth-th after the stem; inner: with the heads
    of the units before."""
    body = chain.names[: 1 + depth]
    exits = {u: chain.get_submodule(h) for u, h in chain.heads.items() if inner and u in body[:-1]}
    head = chain.head_of(body[-1])
    found = Chain([(n, chain.get_submodule(n)) for n in (*body, head)], chain.shape, exits)
    if head == chain.names[-1]:
        found.features = chain.features  # what this head takes
    return found


def with_exits(chain: Chain, name: str, count: int) -> Chain:
    """The chain with a head behind `count` of its units, or all where it has fewer: spread evenly, the last unit's the
    chain's own (of all: m-FeDepth, arXiv 2303.04887). Raises FedpipeError where its head makes none."""
    *body, last = chain.names
    make = getattr(chain.get_submodule(last), "behind", None)
    if make is None:
        raise FedpipeError(
            f"model {name}: it has no exits, which this method needs; its head must have `behind(shape)`, which makes "
            "a head for features of that shape, as those of preresnet20, resnet18, mobilenet, cnn4, vit_tiny and mlp do"
        )
    units = body[1:]
    if count < 1:
        raise FedpipeError(f"model {name}: {count} exits; wanted 1 at least")
    count = min(count, len(units))
    ends = [units[-(-len(units) * k // count) - 1] for k in range(1, count)]
    exits = {u: make(chain.shapes[u]) for u in ends}
    return Chain([(n, chain.get_submodule(n)) for n in chain.names], chain.shape, exits)


def load(
    spec: ModelSpec, shape: Shape, classes: int, skip: int | str = 0, depth: int = 0, inner: bool = True,
    exits: bool | int = False, **extra: Any,
) -> Chain:  # fmt: skip
    """Build the named network, or that of a user's file, for images `shape` = (C, H, W).

    A builder is `net(shape, classes, **settings)` and returns [(unit name, module), ...] or a Chain; `extra` (width,
    scale) goes before the study's settings. Initial values come from torch's global generator: build inside `seeded`.
    skip: units that are left out once all have been built, "b2 b3", or the first so many after the stem; depth: those
    after so many are; exits: every unit gets a head (True), or so many of them, the last included; inner: all heads but
    the last's stay, too.
    Raises FedpipeError for unknown models, settings the builder does not take, and what it returns otherwise.
    """
    chain = _built(spec, shape, classes, extra)
    if exits:
        chain = with_exits(chain, spec.name, len(chain.names) - 2 if exits is True else exits)
    chain = upto(chain, depth, inner) if depth else chain
    if skip:
        chain = without(chain, chain.names[1 : 1 + skip] if isinstance(skip, int) else skip.split())
    return chain


def _built(spec: ModelSpec, shape: Shape, classes: int, extra: dict[str, Any]) -> Chain:
    build, settings = builder(spec.name), {**(spec.model_extra or {}), **extra}
    parameters = inspect.signature(build).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in settings:
            if key not in parameters:
                raise FedpipeError(
                    f"model {spec.name} takes no {key}; it takes {', '.join(list(parameters)[2:]) or 'none'}"
                )
    try:
        inspect.signature(build).bind(shape, classes, **settings)
    except TypeError as e:
        raise FedpipeError(f"model {spec.name}: {e}; wanted a function (shape, classes, ...)") from None
    units = build(shape, classes, **settings)
    if isinstance(units, Chain):
        return units
    listed = isinstance(units, list | tuple) and all(isinstance(u, tuple) and len(u) == 2 for u in units)
    if not listed or not all(isinstance(n, str) and isinstance(m, nn.Module) for n, m in units):
        raise FedpipeError(
            f"model {spec.name}: wanted [(unit name, module), ...] or a Chain, got {type(units).__name__}"
        )
    return Chain(units, shape)


def windows(full: Chain, slim: Chain) -> tuple[Window, ...]:
    """What part of each tensor of `full` the narrower `slim` holds: the first entries of each differing dimension.

    Raises FedpipeError when the two have other tensors, or slim's are larger.
    """
    whole, part = full.state_dict(), slim.state_dict()
    if other := sorted(whole.keys() ^ part.keys()):
        raise FedpipeError(f"model/{other[0]}: only one of the full and the narrow model has it")
    found = []
    for name, t in part.items():
        big = whole[name].shape
        if t.dim() != len(big) or any(s > b for s, b in zip(t.shape, big, strict=True)):
            raise FedpipeError(f"model/{name}: {list(t.shape)} is no part of the full model's {list(big)}")
        found += [Window(f"model/{name}", d, 0, s) for d, s in enumerate(t.shape) if s != big[d]]
    return tuple(found)
