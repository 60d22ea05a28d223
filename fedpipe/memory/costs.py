"""The peaks of plain training of any stretch of a chain, as sums over units that are traced once each.

`recomputation.peak` says what is added up: thousands of plans are compared in seconds, and the one that is chosen is
traced whole. Plain training is the default loss and step. Not added up are running statistics, which change in copies.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.config import Optimizer
from fedpipe.errors import FedpipeError
from fedpipe.memory.predict import tensor_bytes
from fedpipe.memory.recomputation import Option, peak
from fedpipe.memory.unit import Pass, Run, Sample, Still, still, trained, updated
from fedpipe.models import traits
from fedpipe.models.chain import Chain
from fedpipe.phase import optimizer
from fedpipe.recompute import Policy
from fedpipe.types import Patterns, Tensors, matches

T = TypeVar("T")


class Costs:
    """Of a chain, a batch of images, an optimizer, and what is trained of the units a phase trains (`live`).

    Units are counted from 0, the stem; stretches are without the head, which always follows. `known` may be shared.
    """

    def __init__(self, chain: Chain, batch: int, spec: Optimizer, live: Patterns = ("model/*",), known: Any = None):
        self.chain, self.batch, self.spec, self.live = chain.train(), batch, spec, live
        self.body, self.head = chain.names[:-1], chain.names[-1]
        self._known: dict[Any, Any] = {} if known is None else known
        values = {n: t.detach() for n, t in [*chain.named_parameters(), *chain.named_buffers()]}
        self._values = dict(sorted(values.items()))  # as states are: an optimizer's steps follow that order
        like = next((t for t in self._values.values() if t.is_floating_point()), torch.empty(0))
        self._width = like.element_size()
        self.inputs = [Sample((batch, *chain.shape), like.dtype, like.device.type)]  # of the units, and of the head
        self.still: list[Still] = []
        for u in range(len(self.body)):
            self.still.append(self._still(u))
            self.inputs.append(replace(self.inputs[0], shape=self.still[u].shape))
        sizes = [torch.Size(s).numel() * self._width for s in (x.shape for x in self.inputs)]
        # the input of each unit in bytes; the stem's is 0, as images are held anyway
        self.images, self.boundary = sizes[0], [0, *sizes[1:]]

    def peak(self, ways: Sequence[Option]) -> int:
        """Bytes of a phase that trains consecutive units in these ways, and the head behind them."""
        moved, inputs = self.moved(ways, self.tail(ways[-1].last))
        return max(self.constant(ways[0].first, ways[-1].last, peak(moved, inputs)))

    def constant(self, first: int, last: int, rise: int) -> tuple[int, ...]:
        """Bytes at the moments that recomputation does not change, and where the others rise by `rise` at most."""
        names = (*self.body[first : last + 1], self.head)
        kept, temporary = zip(*(self._update(n) for n in names), strict=True)
        held = self.held + sum(kept)
        gradients = sum(self._pass(u, 0, True).gradients for u in range(first, last + 1)) + self.tail(last).gradients
        before = (self.still[u].rise - (self.images if u == 0 else 0) for u in range(first))
        return tuple(held + r for r in (rise, gradients + max(temporary), *before))

    def moved(self, ways: Sequence[Option], tail: Option) -> tuple[list[Option], list[int]]:
        """Ways and tail counted from the first trained unit on, and the inputs of these units in bytes."""
        first = min(w.first for w in ways)
        moved = [replace(w, first=w.first - first, last=w.last - first) for w in (*ways, tail)]
        return moved, self.boundary[first : tail.last + 1]

    @cached_property
    def held(self) -> int:
        """Bytes of parameters, buffers and a batch: images, labels, weights."""
        return tensor_bytes(self._values.values()) + self.images + self.batch * (8 + self._width)

    @cached_property
    def levels(self) -> list[int]:
        """Levels of recomputation that any unit of the body has."""
        return sorted({n for u in range(len(self.body)) for n in self.has(u)})

    @cached_property
    def steady(self) -> frozenset[int]:
        """Units that may run again: not the stem, and none that draws random numbers."""
        drawing = traits.drawing(self.chain)
        return frozenset(u for u, name in enumerate(self.body) if u and name not in drawing)

    def links(self, unit: int) -> bool:
        """Whether a unit's output can be brought to the head."""
        try:
            self.tail(unit)
        except FedpipeError:
            return False
        return True

    def trains(self, name: str) -> bool:
        """Whether any tensor of a unit is trained."""
        return bool(self._of(name)[1])

    def has(self, unit: int) -> tuple[int, ...]:
        """Levels of a unit."""
        levels: tuple[int, ...] = getattr(self.chain.get_submodule(self.body[unit]), "levels", (0,))
        return levels

    @cache  # noqa: B019 (as long-lived as its traces)
    def way(self, unit: int, level: int, deep: bool) -> Option:
        """A unit at a level, or the highest it has below; deep: whether its input has a gradient."""
        has = max(n for n in self.has(unit) if n <= level)
        p, plain = self._pass(unit, has, deep), self._pass(unit, 0, deep)
        rise = p.forward - (0 if unit else self.images)
        extra = max(0.0, p.work - plain.work)
        return Option(unit, unit, has, p.saved, p.input, p.output, rise, p.backward, p.gradients, extra)

    @cache  # noqa: B019
    def again(self, first: int, last: int, deep: bool) -> Option:
        """Units that run again in the backward, where they are held whole until its end."""
        units = range(first, last + 1)
        passes = [self._pass(u, 0, deep or u > first, retain=True, hold=u == last) for u in units]
        inputs, result = self.boundary[first : last + 1], self.boundary[last + 1]
        forward = max(self.still[u].rise + (inputs[0] if u > first else 0) for u in units)
        below, rises = result, []
        for i, p in enumerate(passes):
            rises.append(below + p.forward - (0 if i else inputs[0]))
            below += p.saved + (inputs[i + 1] if i + 1 < len(passes) and (p.output or passes[i + 1].input) else 0)
        whole, gradients = below + result, 0
        for u, p in zip(reversed(units), reversed(passes), strict=True):
            there = p.saved + p.output * self.boundary[u + 1] + (result if u == last else 0)
            rises.append(whole + gradients + p.backward - there)
            gradients += p.gradients
        work = sum(self.still[u].work for u in units)
        return Option(first, last, None, 0, True, False, forward, max(rises), gradients, work)

    @cache  # noqa: B019
    def tail(self, last: int) -> Option:
        """Link, head and loss behind a unit."""
        u = last + 1

        def loss(at: Tensors, x: Tensor) -> Tensor:
            z = torch.func.functional_call(self.chain, at, (x,), {"since": self.body[last], "upto": self.body[last]})
            y, w = z.new_zeros(self.batch, dtype=torch.long), z.new_empty(self.batch)
            return (F.cross_entropy(z, y, reduction="none") * w).sum()

        at, live = self._of(self.head)
        given = self.inputs[u]
        p = self._once(
            (self.head, live, "tail", given, self.chain.features),
            lambda: trained(loss, at, live, given, deep=True, loss=True),
        )
        return Option(u, u, 0, p.saved, p.input, False, p.forward, p.backward, p.gradients, 0.0)

    @cache  # noqa: B019
    def _pass(self, unit: int, level: int, deep: bool, **backward: bool) -> Pass:
        name, given = self.body[unit], self.inputs[unit]
        at, live = self._of(name)
        run = self._run(unit, Policy(((name, level),) if level else ()))
        key = (name, live, "pass", given, level, deep, *backward.values())
        return self._once(key, lambda: trained(run, at, live, given, deep, **backward))

    def _still(self, unit: int) -> Still:
        name, given = self.body[unit], self.inputs[unit]
        return self._once(
            (name, (), "still", given), lambda: still(self._run(unit, Policy()), self._of(name)[0], given)
        )

    @cache  # noqa: B019
    def _update(self, name: str) -> tuple[int, int]:
        at, live = self._of(name)
        make = partial(optimizer, self.spec, lr=0.1)
        return self._once((name, live, "update"), lambda: updated([at[n] for n in live], make) if live else (0, 0))

    def _run(self, unit: int, policy: Policy) -> Run:
        bounds = {"since": self.body[unit - 1] if unit else None, "upto": self.body[unit], "head": False}
        return lambda at, x: torch.func.functional_call(self.chain, at, (x,), {"policy": policy, **bounds})

    def _of(self, name: str) -> tuple[Tensors, tuple[str, ...]]:
        """Parameters and buffers of a unit, and the names of those that are trained."""
        at = {n: t for n, t in self._values.items() if n.startswith(f"{name}.")}
        buffers = self.chain.buffer_names
        return at, tuple(n for n in at if n not in buffers and matches(f"model/{n}", self.live))

    def _once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What is made of a unit and some of its tensors, named first, is made once for all that are built alike."""
        name, live, *rest = key
        alike = (_build(self.chain.get_submodule(name)), tuple(n[len(name) :] for n in live), *rest)
        if alike not in self._known:
            self._known[alike] = make()
        found: T = self._known[alike]
        return found


_PLAIN = (int, float, str, tuple, type(None))


def _build(module: nn.Module) -> tuple[Any, ...]:
    """What two modules share that do the same to the same shapes: types, plain settings, shapes of their tensors."""
    parts = []
    for name, m in module.named_modules():
        own = {k: v for k, v in vars(m).items() if k not in vars(nn.Module())}
        plain = tuple((k, repr(v) if isinstance(v, _PLAIN) else id(v)) for k, v in own.items())
        tensors = [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]
        parts.append((name, type(m), m.training, plain, tuple((n, t.shape, t.dtype) for n, t in tensors)))
    return tuple(parts)
