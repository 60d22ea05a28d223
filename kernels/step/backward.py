"""The step inside backward: a tensor moves as soon as its gradient is complete, and the gradient is freed at once."""

from collections.abc import Mapping
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from fedpipe.kernels.common import Backend
from fedpipe.kernels.step import step_

Named = Mapping[str, Tensor]


class Handle:
    """Until `remove()`, or the end of its `with` block, every backward is one step. buffers: momentum by name."""

    def __init__(self, hooks: list[torch.utils.hooks.RemovableHandle], buffers: dict[str, Tensor]):
        self._hooks, self.buffers = hooks, buffers

    def remove(self) -> None:
        """Gradients are left where they are from now on. May be called again."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def in_backward(
    parameters: Named, lr: float, *, mask: Named | None = None, variate: Named | None = None,
    anchor: Named | None = None, mu: float = 0.0, momentum: float = 0.0, weight_decay: float = 0.0,
    buffers: Named | None = None, backend: Backend = "auto",
) -> Handle:  # fmt: skip
    """Take `step_` on every parameter within `loss.backward()`, so that no more than one gradient has to be alive.

    parameters: contiguous leaves by name, of any shape, stepped as flat views. mask (words), variate and anchor: of
    those parameters that have one, by the same names. buffers: momentum buffers of earlier steps; those of this handle
    are in its `buffers`. Raises ValueError for a tensor that is no leaf and for names that no parameter has.
    """
    given = {"mask": mask or {}, "variate": variate or {}, "anchor": anchor or {}, "buffers": buffers or {}}
    for kind, named in given.items():
        strange = [n for n in named if n not in parameters]
        if strange:
            raise ValueError(f"{kind}: {strange[0]}; wanted names of parameters")
    for name, p in parameters.items():
        if not (p.is_leaf and p.requires_grad and p.is_contiguous()):
            raise ValueError(f"{name}: no contiguous leaf that requires a gradient; wanted one")
    slots = dict(given["buffers"])

    def step(name: str, p: Tensor) -> None:
        g, first = p.grad, bool(momentum) and name not in slots
        assert g is not None
        if first:
            slots[name] = torch.empty_like(p)
        found = {"variate": given["variate"].get(name), "anchor": given["anchor"].get(name), "buffer": slots.get(name)}
        flat = {kind: None if t is None else t.detach().view(-1) for kind, t in found.items()}
        step_(
            p.detach().view(-1), g.contiguous().view(-1), lr, mask=given["mask"].get(name), variate=flat["variate"],
            anchor=flat["anchor"], mu=mu if name in given["anchor"] else 0.0, momentum=momentum,
            weight_decay=weight_decay, buffer=flat["buffer"], first=first, backend=backend,
        )  # fmt: skip
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(partial(step, n)) for n, p in parameters.items()]
    return Handle(hooks, slots)
