"""The step of a phase that names one (`Phase.step`): a kernel's call per live name, in place of an optimizer's step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fedpipe.config import Optimizer
from fedpipe.errors import FedpipeError
from fedpipe.kernels import bits
from fedpipe.kernels.common import Backend, words
from fedpipe.kernels.step import step_
from fedpipe.types import Step, Tensors

MOMENTUM = "momentum_buffer"  # torch.optim.SGD's, so that what is carried is the same with and without a fused step


class Fused:
    """The step over the leaves of one phase, of one client or a stack; masks are packed here, once.

    With SGD the whole step is one kernel. Another optimizer takes `direction`'s result for its gradient, and `project`
    cuts its step by the mask: slower, and what the same method written with hooks does.

    Raises FedpipeError, naming method, phase and key, for tensors of `at` that the step names and that are missing, of
    another shape than the leaf, or no masks.
    """

    def __init__(self, who: str, spec: Optimizer, step: Step, lr: float, leaves: Tensors, at: Tensors, stacked: bool,
                 backend: Backend):  # fmt: skip
        self.who, self.stacked, self.backend = who, stacked, backend
        self.whole = spec.name == "sgd"
        self.lr, self.decay, self.momentum = lr, spec.weight_decay, spec.momentum
        self.mu = step.mu if step.anchor else 0.0
        self.names = {
            key: self._names(key, pattern, leaves, at)
            for key, pattern in (("variate", step.variate), ("anchor", step.anchor))
            if pattern
        }
        self.masks = self._masks(step.mask, leaves, at) if step.mask else {}

    def __call__(self, leaves: Tensors, d: Tensors, at: Tensors, slots: dict[str, dict[str, Any]]) -> None:
        """Move the leaves that have a direction, and their momentum buffers in the optimizer's slots, by name."""
        for n, leaf in leaves.items():
            if n not in d:
                continue
            slot, first = slots[n], bool(self.momentum) and MOMENTUM not in slots[n]
            if first:
                slot[MOMENTUM] = torch.empty_like(leaf)
            held = {key: self._rows(at[names[n]].contiguous()) for key, names in self.names.items()}
            step_(
                self._rows(leaf), self._rows(d[n].contiguous()), self.lr, mask=self.masks.get(n),
                variate=held.get("variate"), anchor=held.get("anchor"), mu=self.mu, weight_decay=self.decay,
                momentum=self.momentum, buffer=self._rows(slot[MOMENTUM]) if self.momentum else None, first=first,
                backend=self.backend,
            )  # fmt: skip

    def direction(self, leaves: Tensors, d: Tensors, at: Tensors) -> Tensors:
        """g - h + mu (x - anchor) of the leaves that have a direction g."""
        names = {key: {n: at[name] for n, name in found.items()} for key, found in self.names.items()}
        h, anchor = names.get("variate", {}), names.get("anchor", {}) if self.mu else {}
        d = {n: g - h[n] if h else g for n, g in d.items()}
        return {n: g + self.mu * (leaves[n].detach() - anchor[n]) if anchor else g for n, g in d.items()}

    def project(self, leaves: Tensors) -> None:
        """Zero what the masks leave out, in place."""
        for n, mask in self.masks.items():
            if isinstance(mask, FakeTensor):
                continue
            leaf = self._rows(leaves[n])
            leaf.masked_fill_(~bits.unpack(mask, leaf.shape[-1], self.backend), 0)

    def _rows(self, t: Tensor) -> Tensor:
        """A flat view: [n], or [clients, n] of a stack."""
        return t.detach().view(len(t), -1) if self.stacked else t.detach().view(-1)

    def _names(self, key: str, pattern: str, leaves: Tensors, at: Mapping[str, Tensor]) -> dict[str, str]:
        """The name that a pattern means for each leaf."""
        found = {n: meant(pattern, n, at) for n in leaves}
        for n, name in found.items():
            if name is None:
                wanted = " or ".join(dict.fromkeys(candidates(pattern, n)))
                raise FedpipeError(f"{self.who}.{key}: {wanted} is neither held (plan.hold), kept nor made by begin")
            if at[name].shape != leaves[n].shape:
                shapes = f"{tuple(at[name].shape)}, wanted {tuple(leaves[n].shape)} of {n}"
                raise FedpipeError(f"{self.who}.{key}: {name} has shape {shapes}")
        return {n: name for n, name in found.items() if name is not None}

    def _masks(self, pattern: str, leaves: Tensors, at: Tensors) -> Tensors:
        """Words of the masks of those leaves that have one."""
        masked = {n: leaf for n, leaf in leaves.items() if meant(pattern, n, at)}
        if not masked:
            raise FedpipeError(f"{self.who}.mask: no live name has a mask {pattern}")
        names = self._names("mask", pattern, masked, at)
        for name in names.values():
            if at[name].dtype != torch.bool:
                raise FedpipeError(f"{self.who}.mask: {name} is {at[name].dtype}; wanted bool")
        return {n: packed(self._rows(at[name].contiguous()), self.backend) for n, name in names.items()}


def candidates(pattern: str, live: str) -> tuple[str, str]:
    """What a pattern may mean for a live name: with all of it in place of `*`, or what follows its namespace."""
    return pattern.replace("*", live.split("/", 1)[-1]), pattern.replace("*", live)


def meant(pattern: str, live: str, at: Mapping[str, Tensor]) -> str | None:
    return next((name for name in candidates(pattern, live) if name in at), None)


def packed(mask: Tensor, backend: Backend) -> Tensor:
    """Words of a mask; of a traced one, which holds nothing, only their size counts."""
    if isinstance(mask, FakeTensor):
        return torch.empty((*mask.shape[:-1], words(mask.shape[-1])), dtype=torch.int32, device=mask.device)
    return bits.pack(mask, backend)
