"""The units of a chain, and the head behind them, each trained alone: captured and run once for all that are alike."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedpipe.config import Optimizer
from fedpipe.context import Ctx
from fedpipe.loop.capture import NotCaptured
from fedpipe.loop.lower import Sgd
from fedpipe.loop.mover import optimizer
from fedpipe.memory import played
from fedpipe.memory import unit as eager
from fedpipe.memory.predict import tensor_bytes
from fedpipe.memory.script import Kind, Script, written
from fedpipe.memory.unit import Pass, Run, Sample, Still, build, ordered, updated
from fedpipe.models.chain import Chain
from fedpipe.recompute import Policy
from fedpipe.types import Patterns, Tensors, matches

T = TypeVar("T")
PLAIN = Ctx({}, 0, 1, 0)  # whose loss is the default


@dataclass(frozen=True)
class Part:
    """A unit, or link, head and loss, alone. key: what tells it from others that are built alike."""

    name: str
    run: Run
    at: Tensors
    live: tuple[str, ...]
    x: Sample
    key: tuple[Any, ...]


class Passes:
    """Of a chain, a batch of images, an optimizer, and what is trained of the units a phase trains (`live`).

    Units are counted from 0, the stem. ends: a unit is the last before the head, and gives the pixels alone that the
    link keeps where it can. `known` may be shared; order: of dimensions.
    """

    def __init__(self, chain: Chain, batch: int, spec: Optimizer, live: Patterns = ("model/*",), known: Any = None,
                 order: torch.memory_format = torch.contiguous_format):  # fmt: skip
        self.chain, self.batch, self.spec, self.live = chain.train(), batch, spec, live
        self.body = chain.names[:-1]
        self._known: dict[Any, Any] = {} if known is None else known
        values = {n: ordered(t.detach(), order) for n, t in [*chain.named_parameters(), *chain.named_buffers()]}
        # as states are: an optimizer's steps follow that order
        self.values = {n: values[n] for n in sorted(values.keys() & {*chain.tensor_names})}
        drawn = {n: (batch, *d.shape) for n, d in chain.noise.layers.items()}
        like = next((t for t in self.values.values() if t.is_floating_point()), torch.empty(0))
        self.masks = {f"{n}.keep": like.new_empty(shape, dtype=torch.bool) for n, shape in drawn.items()}
        self.fixed = frozenset({*chain.buffer_names, *self.masks})
        images = ordered(torch.empty(batch, *chain.shape, device="meta"), order)
        # of the units, and of the head
        self.inputs = [Sample(tuple(images.shape), images.stride(), like.dtype, like.device.type, own=False)]
        self.captured = True  # whether steps are
        try:
            self.still = self._forward()
        except NotCaptured:
            self.captured = False
            self.still = self._forward()

    def _forward(self) -> list[Still]:
        """Of each unit, its input kept where that is the images."""
        found: list[Still] = []
        for u in range(len(self.body)):
            found.append(self.run(u, kept=u == 0))
            self.inputs[u + 1 :] = [found[u].result]
        return found

    @cached_property
    def sgd(self) -> Sgd | None:
        """By what a captured step moves weights as it goes."""
        spec = self.spec
        return Sgd(spec.momentum, spec.weight_decay) if self.captured and spec.name == "sgd" else None

    def trains(self, name: str) -> bool:
        """Whether any tensor of a unit is trained."""
        return bool(self._of(name)[1])

    @cache  # noqa: B019 (as long-lived as its traces)
    def copied(self, name: str) -> int:
        """Bytes of a unit's buffers and masks, which change in copies where it runs again."""
        return tensor_bytes(t for n, t in self._of(name)[0].items() if n in self.fixed)

    def head(self, last: int) -> str:
        """The head behind a unit."""
        return self.chain.head_of(self.body[last])

    def given(self, last: int) -> Sample:
        """What a unit before the head gives."""
        return self.run(last, True).result

    @cache  # noqa: B019
    def run(self, u: int, ends: bool = False, kept: bool = False) -> Still:
        """A unit without a backward. kept: its input is till the end."""
        part = self._unit(u, 0, ends)

        def made() -> Still:
            if not self.captured:
                return eager.still(part.run, part.at, part.x)
            return played.still(written(part.run, part.at, (), part.x), kept)

        return self._once((part.name, (), "still", part.key, kept, self.captured), made)

    @cache  # noqa: B019
    def one(self, u: int, level: int, deep: bool, ends: bool, kept: bool, kind: Kind = "plain") -> Pass:
        """A unit's forward and backward. deep: its input has a gradient; kept: and is kept by what has made it."""
        return self._passed(self._unit(u, level, ends), self._gradient(u, ends), deep, kept, kind)

    @cache  # noqa: B019
    def end(self, last: int, kept: bool) -> Pass:
        """Those of link, head and loss behind a unit."""
        return self._passed(self._tail(last), None, True, kept, "loss")

    @cache  # noqa: B019
    def update(self, name: str) -> tuple[int, int]:
        """Bytes the optimizer keeps for a unit, and the rise of its step."""
        at, live = self._of(name)
        tensors = [at[n] for n in live]
        if self.sgd:
            return tensor_bytes(tensors) if self.sgd.momentum else 0, 0
        make = partial(optimizer, self.spec, lr=0.1)
        return self._once((name, live, "update"), lambda: updated(tensors, make) if live else (0, 0))

    def _passed(self, part: Part, g: Sample | None, deep: bool, kept: bool, kind: Kind) -> Pass:
        script, key = self._script(part, g, deep, kind), (part.name, part.live, "pass", part.key, deep)
        if script is None:
            alone = partial(eager.trained, part.run, part.at, part.live, part.x, deep, kind == "loss")
            return self._once((*key, kind == "loss"), alone)
        return self._once((*key, g, kind, self.sgd, kept), lambda: played.trained(script, kept))

    def _script(self, part: Part, g: Sample | None, deep: bool, kind: Kind) -> Script | None:
        """None of what cannot be captured."""
        buffers = tuple(n for n in part.at if n in self.fixed)

        def made() -> Script | None:
            try:
                return written(part.run, part.at, part.live, part.x, g, deep, kind, self.sgd, buffers)
            except NotCaptured:
                return None

        key = part.name, part.live, "script", part.key, g, deep, kind, self.sgd
        return self._once(key, made) if self.captured else None

    @cache  # noqa: B019
    def _gradient(self, u: int, ends: bool) -> Sample:
        """What the gradient of a unit's result is like: as what follows makes it."""
        end = len(self.body) - 1
        for v in range(end, u, -1):  # those behind first
            self._gradient(v, False)
        if ends or u == end:
            following = self._script(self._tail(u), None, True, "loss")
        else:
            following = self._script(self._unit(u + 1), self._gradient(u + 1, False), True, "plain")
        return (following and following.back) or (self.given(u) if ends else self.inputs[u + 1])

    @cache  # noqa: B019
    def _unit(self, u: int, level: int = 0, ends: bool = False) -> Part:
        name, x, every = self.body[u], self.inputs[u], self.chain.every(self.body[u]) if ends else 1
        bounds = {"since": self.body[u - 1] if u else None, "upto": name, "head": False}
        words = {"policy": Policy(((name, level),) if level else ()), "every": every, **bounds}

        def run(at: Tensors, x: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(self.chain, at, (x,), words)
            return out

        return Part(name, run, *self._of(name), x, (x, level, every))

    @cache  # noqa: B019
    def _tail(self, last: int) -> Part:
        at, live = self._of(self.head(last))
        x, words = self.given(last), {"since": self.body[last], "upto": self.body[last]}
        like = torch.empty(self.batch, dtype=x.dtype, device=x.device)
        batch = {"y": like.long(), "w": like}

        def loss(at: Tensors, x: Tensor) -> Tensor:
            own = {n: t for n, t in at.items() if n not in batch}
            return PLAIN.task(torch.func.functional_call(self.chain, own, (x,), words), at)

        own = self.body[last] in self.chain.heads
        return Part(self.head(last), loss, {**at, **batch}, live, x, ("tail", x, () if own else self.chain.features))

    @cache  # noqa: B019
    def _of(self, name: str) -> tuple[Tensors, tuple[str, ...]]:
        """Parameters, buffers and masks of a unit, and the names of those that are trained."""
        at = {n: t for n, t in [*self.values.items(), *self.masks.items()] if n.startswith(f"{name}.")}
        return at, tuple(n for n in at if n not in self.fixed and matches(f"model/{n}", self.live))

    def _once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What is made of a unit and some of its tensors, named first, is made once for all that are built alike."""
        name, live, *rest = key
        alike = (build(self.chain.get_submodule(name)), tuple(n[len(name) :] for n in live), *rest)
        if alike not in self._known:
            self._known[alike] = make()
        found: T = self._known[alike]
        return found
