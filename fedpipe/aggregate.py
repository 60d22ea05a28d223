"""The mean by name over those who hold an entry, and the check of what clients sent."""

from collections.abc import Iterable

import torch

from fedpipe.errors import FedpipeError
from fedpipe.types import PRIVATE, Plan, Tensors, Update, Window, matches


def region(shape: torch.Size, windows: Iterable[Window]) -> tuple[torch.Tensor | slice, ...]:
    """Index of the entries that windows leave of a tensor; a window past the end wraps round."""
    spans = {w.dim: w for w in windows}
    if all(w.stop <= shape[d] for d, w in spans.items()):
        return tuple(slice(spans[d].start, spans[d].stop) if d in spans else slice(None) for d in range(len(shape)))
    ranges = [
        torch.arange(spans[d].start, spans[d].stop) % n if d in spans else torch.arange(n) for d, n in enumerate(shape)
    ]
    return torch.meshgrid(*ranges, indexing="ij")


def cut(tensors: Tensors, index: tuple[Window, ...]) -> Tensors:
    """The part of each tensor a client holds."""
    by_name = _by_name(index)
    return {n: t[region(t.shape, by_name[n])] if n in by_name else t for n, t in tensors.items()}


def _by_name(index: tuple[Window, ...]) -> dict[str, list[Window]]:
    out: dict[str, list[Window]] = {}
    for w in index:
        out.setdefault(w.name, []).append(w)
    return out


def mean(state: Tensors, updates: Iterable[Update]) -> Tensors:
    """Entry-wise weighted mean over the updates that hold an entry (by name, window and `mask/<name>`).

    Entries nobody holds, integer tensors and names of the state nobody sent keep their old value. Sums are kept in
    float64 and updates are folded as they arrive.
    """
    total: Tensors = {}
    weight: Tensors = {}
    for u in updates:
        windows = _by_name(u.index)
        for name, t in u.tensors.items():
            if name not in state or name.startswith("mask/") or not t.is_floating_point():
                continue
            if name not in total:
                total[name] = torch.zeros_like(state[name], dtype=torch.float64)
                weight[name] = torch.zeros((), dtype=torch.float64, device=t.device)
            mask = u.tensors.get(f"mask/{name}")
            if (name in windows or mask is not None) and not weight[name].ndim:
                weight[name] = weight[name].expand(state[name].shape).clone()
            at = region(state[name].shape, windows[name]) if name in windows else ...
            held = u.weight if mask is None else u.weight * mask.double()
            total[name][at] += held * t.double()
            weight[name][at] += held
    out = dict(state)
    for name, s in total.items():
        w = weight[name]
        out[name] = torch.where(w > 0, s / w.clamp_min(torch.finfo(torch.float64).tiny), state[name].double()).to(
            state[name].dtype
        )
    return out


def check(update: Tensors, state: Tensors, plan: Plan, who: str) -> None:
    """Refuse what a client sent unless its names, shapes and values are those its plan promises."""
    windows = _by_name(plan.index)

    def shape(name: str) -> tuple[int, ...]:
        size = list(state[name].shape)
        for w in windows.get(name, []):
            size[w.dim] = w.stop - w.start
        return tuple(size)

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
