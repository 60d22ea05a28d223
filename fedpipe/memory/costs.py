"""The peaks of plain training of any stretch of a chain, as sums over units that are traced once each.

`recomputation.peak` says what is added up: thousands of plans are compared in seconds, and the one that is chosen is
traced whole. Plain training is the default loss and step.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import torch

from fedpipe.errors import FedpipeError
from fedpipe.memory.passes import Passes
from fedpipe.memory.predict import tensor_bytes
from fedpipe.memory.recomputation import Option, moments, peak
from fedpipe.models import traits


class Costs(Passes):
    """The options of each unit. Stretches are without the head, which always follows."""

    def __init__(self, *given: Any, **words: Any) -> None:
        super().__init__(*given, **words)
        # the input of each unit in bytes; the stem's is 0, as images are held anyway
        self.images, self.boundary = self.inputs[0].bytes, [0, *(x.bytes for x in self.inputs[1:])]

    def peak(self, ways: Sequence[Option]) -> int:
        """Bytes of a phase that trains consecutive units in these ways, and the head behind them."""
        moved, inputs = self.moved(ways, self.tail(ways[-1].last))
        return max(self.constant(ways[0].first, ways[-1].last, peak(moved, inputs)))

    def constant(self, first: int, last: int, rise: int) -> tuple[int, ...]:
        """Bytes at the moments that recomputation does not change, and where the others rise by `rise` at most."""
        names = (*self.body[first : last + 1], self.head(last))
        kept, temporary = zip(*(self.update(n) for n in names), strict=True)
        run = {*self.body[: last + 1], self.head(last)}
        masks = sum(m.nbytes for n, m in self.masks.items() if n.split(".")[0] in run)
        held, units = self.held + sum(kept) + masks, range(first, last + 1)
        gradients = self.tail(last).gradients + sum(self.one(u, 0, True, False, False).gradients for u in units)
        before = (self.still[u].rise - (self.images if u == 0 else 0) for u in range(first))
        return tuple(held + r for r in (rise, gradients + max(temporary), *before))

    def moved(self, ways: Sequence[Option], tail: Option) -> tuple[list[Option], list[int]]:
        """Ways and tail counted from the first trained unit on, and the inputs of these units in bytes."""
        first = min(w.first for w in ways)
        moved = [w.moved(first) for w in (*ways, tail)]
        return moved, [*self.boundary[first : tail.last], self.given(tail.last - 1).bytes]

    @cached_property
    def held(self) -> int:
        """Bytes of parameters, buffers and a batch: images, labels, weights."""
        # running statistics twice more, as the step before left them and as this one makes them; two values of a loss
        stats = tensor_bytes(self.values[n] for n in self.chain.buffer_names)
        width = self.inputs[0].dtype.itemsize
        return tensor_bytes(self.values.values()) + 2 * stats + self.images + self.batch * (8 + width) + 2 * width

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
        """Whether a unit's output can be brought to a head."""
        if self.body[unit] in self.chain.heads:
            return True
        try:
            self.chain.link(torch.empty(self.given(unit).shape, device="meta"), self.body[unit])
        except FedpipeError:
            return False
        return True

    def has(self, unit: int) -> tuple[int, ...]:
        """Levels of a unit."""
        return tuple(getattr(self.chain.get_submodule(self.body[unit]), "levels", (0,)))

    @cache  # noqa: B019 (as long-lived as its traces)
    def way(self, unit: int, level: int, deep: bool, ends: bool = False) -> Option:
        """A unit at a level, or the highest it has below; deep: whether its input has a gradient."""
        has = max(n for n in self.has(unit) if n <= level)

        def made(kept: bool) -> Option:
            p, plain = self.one(unit, has, deep, ends, kept), self.one(unit, 0, deep, ends, kept)
            rise = p.forward - (0 if unit else self.images)
            extra = max(0.0, p.work - plain.work)
            return Option(unit, unit, has, p.saved, p.input, p.output, rise, p.backward, p.gradients, extra)

        return self._either(made, unit, deep, kept=unit == 0)  # images are held anyway

    @cache  # noqa: B019
    def again(self, first: int, last: int, deep: bool, ends: bool = False) -> Option:
        """Units that run again in the backward."""
        units = range(first, last + 1)
        runs = [self.run(u, ends and u == last, kept=u == first) for u in units]
        result = self.given(last).bytes if ends else self.boundary[last + 1]
        sizes = self.boundary[first : last + 1]
        # buffers are saved in copies, and changed in others
        copies = sum(self.copied(self.body[u]) for u in units)
        forward = 2 * copies + max(run.rise + (sizes[0] if i else 0) for i, run in enumerate(runs))

        def made(kept: bool) -> Option:
            rows, below = list[Option](), kept
            for i, u in enumerate(units):
                goes = deep or any(self.trains(n) for n in self.body[first:u])
                p = self.one(u, 0, goes, ends and u == last, below, "end" if u == last else "again")
                kept_input = p.input or (kept and not i)
                rows.append(Option(i, i, 0, p.saved, kept_input, p.output, p.forward, p.backward, p.gradients, 0.0))
                below = p.output
            # the gradient that comes in is there while the units run again; the input is kept as before
            up, down = moments(rows, sizes)
            down += 0 if self.captured else result  # or all the time, by autograd
            rise = max(0, max(copies + result + up, down) - sizes[0])
            gradients, work = sum(o.gradients for o in rows), sum(run.work for run in runs)
            return Option(first, last, None, copies, True, False, forward, rise, gradients, work)

        return self._either(made, first, deep)

    def _either(self, made: Callable[[bool], Option], unit: int, deep: bool, kept: bool = False,
                ends: bool = False) -> Option:  # fmt: skip
        """An option that begins with a unit, as it is where the output before it is kept, and where not."""
        before = unit - 1
        keeps = deep and any(self.one(before, n, before > 0, ends, before == 0).output for n in self.has(before))
        return replace(made(kept), kept=made(True) if keeps else None)

    @cache  # noqa: B019
    def tail(self, last: int) -> Option:
        """Link, head and loss behind a unit."""

        def made(kept: bool) -> Option:
            u, p = last + 1, self.end(last, kept)
            return Option(u, u, 0, p.saved, p.input, False, p.forward, p.backward, p.gradients, 0.0)

        return self._either(made, last + 1, deep=True, ends=True)
