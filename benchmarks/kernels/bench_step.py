"""The masked local step against torch's ways of taking it. What torch changes on the way (the gradient) it may keep."""

from typing import Any

import pytest
import torch
from rows import DEVICE, SMALL, Call, Row, compiled, run, unpacked
from torch import Tensor

from fedpipe.kernels import bits
from fedpipe.kernels.step import bytes_moved, step_

LR, MU, MOMENTUM, DECAY = 1e-3, 0.01, 0.9, 5e-4
TENSORS = 100  # a model's, for torch's calls over lists


def fusable(x: Tensor, g: Tensor, words: Tensor, h: Tensor | None, a: Tensor | None, b: Tensor | None) -> None:
    """The step with the same mask of bits, for torch.compile to make one kernel of."""
    d = g.float()
    if h is not None:
        d = d - h.float()
    if a is not None:
        d = d + MU * (x - a)
    if b is not None:
        d = b.copy_(MOMENTUM * b + (d + DECAY * x))
    x.copy_(torch.where(unpacked(words, len(x)), x - LR * d, 0.0))


def eager(x: Tensor, g: Tensor, mask: Tensor, h: Tensor | None, a: Tensor | None, b: Tensor | None) -> None:
    if h is not None:
        g.sub_(h)
    if a is not None:
        g.add_(x - a, alpha=MU)
    if b is not None:
        g = b.mul_(MOMENTUM).add_(g.add_(x, alpha=DECAY))
    x.sub_(g, alpha=LR)
    x.mul_(mask)


def foreach(x: list[Tensor], g: list[Tensor], mask: list[Tensor], h: list[Tensor], a: list[Tensor],
            b: list[Tensor]) -> None:  # fmt: skip
    """mask: in x's type, as lists of mixed types are run one by one."""
    if h:
        torch._foreach_sub_(g, h)
    if a:
        torch._foreach_add_(g, torch._foreach_sub(x, a), alpha=MU)
    if b:
        torch._foreach_add_(g, x, alpha=DECAY)
        torch._foreach_mul_(b, MOMENTUM)
        torch._foreach_add_(b, g)
        g = b
    torch._foreach_sub_(x, g, alpha=LR)
    torch._foreach_mul_(x, mask)


def make(n: int, variate: bool = True, anchor: bool = False, momentum: bool = False, low: bool = False,
         lists: bool = True) -> tuple[Call, dict[str, Call]]:  # fmt: skip
    def fresh(wanted: bool = True, rounded: bool = False) -> Tensor | None:
        t = torch.randn(n, device=DEVICE)
        return None if not wanted else t.bfloat16() if rounded else t

    x, g, h, a, b = fresh(), fresh(True, low), fresh(variate, low), fresh(anchor), fresh(momentum)
    assert x is not None and g is not None
    mask = torch.rand(n, device=DEVICE) < 0.3
    packed = bits.pack(mask)
    numbers = {"momentum": MOMENTUM, "weight_decay": DECAY} if momentum else {}
    parts = [
        list(t.split(-(-n // TENSORS))) if t is not None else [] for t in (x, g, mask.float() if lists else x, h, a, b)
    ]
    return lambda: step_(x, g, LR, mask=packed, variate=h, anchor=a, mu=MU if anchor else 0.0, buffer=b, **numbers), {
        "eager": lambda: eager(x, g, mask, h, a, b),
        "words": lambda: eager(x, g, unpacked(packed, n), h, a, b),
        **({"foreach": lambda: foreach(*parts)} if lists else {}),
        "compile": compiled(fusable, x, g, packed, h, a, b),
    }


def moved(**which: Any) -> Any:
    return lambda n: bytes_moved(n, **which)


ROWS = [
    Row("masked step", make, moved(), limits={"copies": 2.19, "compile": 0.97, "eager": 1.9, "foreach": 1.9}),
    Row("masked step, momentum and decay", lambda n: make(n, momentum=True), moved(momentum=True),
        limits={"copies": 3.28, "compile": 0.97, "eager": 2.2, "foreach": 2.2}),
    Row("masked step, proximal", lambda n: make(n, variate=False, anchor=True), moved(variate=False, anchor=True),
        limits={"copies": 2.19, "compile": 0.97, "eager": 2.2, "foreach": 2.2}),
    Row("masked step, gradients in bf16", lambda n: make(n, low=True, lists=False), moved(itemsize=2),
        limits={"copies": 1.65, "compile": 0.97, "eager": 1.8}),
    Row("masked step, small", make, moved(), n=SMALL),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_step(row: Row, benchmark: Any) -> None:
    run(row, benchmark)
