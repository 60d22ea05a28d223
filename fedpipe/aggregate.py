"""The mean by name over those who hold an entry, and the check of what clients sent."""

from collections.abc import Iterable

import torch

from fedpipe.errors import FedpipeError
from fedpipe.kernels import bits
from fedpipe.kernels.aggregate import Fold, Part, held, region
from fedpipe.kernels.common import Backend
from fedpipe.types import PRIVATE, Plan, Tensors, Update, Window, matches


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


def mean(state: Tensors, updates: Iterable[Update], backend: Backend = "auto") -> Tensors:
    """Entry-wise weighted mean over the updates that hold an entry (by name, window and `mask/<name>`).

    Entries nobody holds, integer tensors and names of the state nobody sent keep their old value. Sums are kept in
    float64 and updates are folded as they arrive.
    """
    folds: dict[str, Fold] = {}
    for u in updates:
        windows = _by_name(u.index)
        for name, t in u.tensors.items():
            if name not in state or name.startswith("mask/") or not t.is_floating_point():
                continue
            if name not in folds:
                folds[name] = Fold(state[name], backend)
            mask = u.tensors.get(f"mask/{name}")
            words = None if mask is None else bits.pack((mask != 0).flatten())
            folds[name].add(Part(t.contiguous(), u.weight, words, tuple(windows.get(name, ()))))
    return {**state, **{name: fold.result() for name, fold in folds.items()}}


def check(update: Tensors, state: Tensors, plan: Plan, who: str) -> None:
    """Refuse what a client sent unless its names, shapes and values are those its plan promises."""
    windows = _by_name(plan.index)

    def shape(name: str) -> tuple[int, ...]:
        return held(state[name].shape, windows.get(name, ()))

    missing = [n for n in state if matches(n, plan.up) and n not in update]
    if missing:
        raise FedpipeError(f"{who}: {missing[0]} is missing; the plan sends {', '.join(plan.up)}")
    for name, t in update.items():
        if name.startswith(PRIVATE):
            raise FedpipeError(f"{who}: {name} is private and must not be sent")
        known = name if name in state else name.removeprefix("mask/")
        if known not in state and known.startswith("model/"):
            raise FedpipeError(f"{who}: {name} is no tensor of the state it started from")
        if known in state and tuple(t.shape) != shape(known):
            raise FedpipeError(f"{who}: {name} has shape {tuple(t.shape)}, wanted {shape(known)}")
        if name in state and t.dtype != state[name].dtype:
            raise FedpipeError(f"{who}: {name} is {t.dtype}, wanted {state[name].dtype}")
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise FedpipeError(f"{who}: {name} holds values that are not finite")
