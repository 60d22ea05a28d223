"""The mean by name over those who hold an entry, and what a plan lets clients receive and send."""

from collections.abc import Iterable
from functools import lru_cache

import torch

from fedpipe.errors import FedpipeError
from fedpipe.kernels import bits
from fedpipe.kernels.aggregate import Fold, Part, Whole, held, region
from fedpipe.kernels.common import Backend, chosen
from fedpipe.messages import Layout, finite, layout
from fedpipe.types import PRIVATE, Patterns, Plan, Tensors, Update, Window, matches


def cut(tensors: Tensors, index: tuple[Window, ...]) -> Tensors:
    """The part of each tensor a client holds."""
    by_name = _by_name(index)
    return {n: t[region(t.shape, by_name[n])] if n in by_name else t for n, t in tensors.items()}


def _by_name(index: tuple[Window, ...]) -> dict[str, list[tuple[int, int, int]]]:
    """Windows of each tensor as (dimension, start, stop)."""
    out: dict[str, list[tuple[int, int, int]]] = {}
    for w in index:
        out.setdefault(w.name, []).append((w.dim, w.start, w.stop))
    return out


# ------------------------------------------------------------------------------------------------- mean
def mean(state: Tensors, updates: Iterable[Update], backend: Backend = "auto") -> Tensors:
    """Entry-wise weighted mean over the updates that hold an entry (by name, window and `mask/<name>`).

    Entries nobody holds, integer tensors and names of the state nobody sent keep their old value. Sums are kept in
    float64 and updates are folded as they arrive.
    """
    folds: dict[str, Fold] = {}
    whole: Whole | None = None
    for i, u in enumerate(updates):
        if i == 0:
            whole = _whole(state, u, backend)
        if whole and (_cuts(u, whole) or not whole.takes(u.tensors, u.weight)):
            folds = {n: Fold(state[n], backend, sums) for n, sums in whole.apart().items()} | folds
            whole = None
        if whole:
            whole.add(u.tensors, u.weight)
        _fold(folds, state, u, backend, whole.old if whole else {})
    means = whole.result() if whole else {}
    return {**state, **means, **{name: fold.result() for name, fold in folds.items()}}


def _fold(folds: dict[str, Fold], state: Tensors, u: Update, backend: Backend, done: Tensors) -> None:
    """Fold what an update has besides the names that are `done`."""
    if len(done) == len(u.tensors):
        return
    windows = _by_name(u.index)
    for name, t in u.tensors.items():
        if name in done or name not in state or name.startswith("mask/") or not t.is_floating_point():
            continue
        if name not in folds:
            folds[name] = Fold(state[name], backend)
        mask = u.tensors.get(f"mask/{name}")
        words = None if mask is None else bits.pack((mask != 0).flatten())
        folds[name].add(Part(t.contiguous(), u.weight, words, tuple(windows.get(name, ()))))


def _whole(state: Tensors, first: Update, backend: Backend) -> Whole | None:
    """A fold of what the first update holds whole of small tensors: where nobody holds less, it serves for all."""
    cuts = {w.name for w in first.index} | {n.removeprefix("mask/") for n in first.tensors if n.startswith("mask/")}
    old = {
        n: state[n]
        for n, t in first.tensors.items()
        if n in state and n not in cuts and t.is_floating_point() and Whole.small(state[n])
    }
    if not old or any(chosen(backend, t) for t in old.values()):
        return None
    return Whole(old)


def _cuts(u: Update, whole: Whole) -> bool:
    """Whether an update holds only a part of a tensor that the others hold whole."""
    return any(w.name in whole.old for w in u.index) or any(f"mask/{n}" in u.tensors for n in whole.old)


# ------------------------------------------------------------------------------------------------ terms
@lru_cache(maxsize=4096)
def _chosen(names: tuple[str, ...], patterns: Patterns) -> tuple[str, ...]:
    return tuple(n for n in names if matches(n, patterns))


def picked(tensors: Tensors, patterns: Patterns) -> Tensors:
    """`select`, the patterns matched once for the same names."""
    return {n: tensors[n] for n in _chosen(tuple(tensors), patterns)}


class Terms:
    """What a plan comes to for states of one layout, found once: names sent down and up, their shapes and types."""

    def __init__(self, plan: Plan, state: Tensors):
        self.plan, self.layout = plan, layout(state)
        windows = _by_name(plan.index)
        self.wanted = {n: (torch.Size(held(t.shape, windows.get(n, ()))), t.dtype) for n, t in state.items()}
        names = tuple(state)
        self.up = _chosen(names, plan.up)
        there = set(_chosen(names, plan.fixed))
        down = [n for n in _chosen(names, plan.down) if n not in there]
        self.down: Layout = tuple((n, self.wanted[n][1], self.wanted[n][0]) for n in down)  # as a message has them

    def check(self, update: Tensors, who: str) -> None:
        """Refuse what a client sent unless its names, shapes and types are those the plan promises."""
        for name in self.up:
            if name not in update:
                raise FedpipeError(f"{who}: {name} is missing; the plan sends {', '.join(self.plan.up)}")
        for name, t in update.items():
            if self.wanted.get(name) != (t.shape, t.dtype):
                self._refuse(name, t, who)

    def _refuse(self, name: str, t: torch.Tensor, who: str) -> None:
        """Say what is wrong with a tensor that is none of the state; nothing is with a mask of one, or an extra."""
        if name.startswith(PRIVATE):
            raise FedpipeError(f"{who}: {name} is private and must not be sent")
        known = name if name in self.wanted else name.removeprefix("mask/")
        if known not in self.wanted and known.startswith("model/"):
            raise FedpipeError(f"{who}: {name} is no tensor of the state it started from")
        if known in self.wanted and t.shape != self.wanted[known][0]:
            raise FedpipeError(f"{who}: {name} has shape {tuple(t.shape)}, wanted {tuple(self.wanted[known][0])}")
        if name in self.wanted:
            raise FedpipeError(f"{who}: {name} is {t.dtype}, wanted {self.wanted[name][1]}")


def check(update: Tensors, state: Tensors, plan: Plan, who: str) -> None:
    """Refuse what a client sent unless its names, shapes and values are those its plan promises."""
    Terms(plan, state).check(update, who)
    check_finite(update, who)


def check_finite(update: Tensors, who: str) -> None:
    """Refuse an update that holds infinities or NaN, named by its tensor."""
    for name, t in update.items():
        if not finite(t):
            raise FedpipeError(f"{who}: {name} holds values that are not finite")
