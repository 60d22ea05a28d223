"""Blocks of a network by the kernels of norm and ReLU: alone, stacked, and under `torch.func`."""

from interpreter import DEVICE, poisoned  # noqa: F401, I001 (the interpreter is asked for first)

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.models.norms import norm_relu
from fedpipe.models.preresnet import Block
from fedpipe.recompute import Conv

WAYS = ["plain", "around vmap", "vmap of grad", "shared weights"]


def gradients(unit: nn.Module, level: int, way: str) -> dict[str, Tensor]:
    """Gradients of the input and every parameter, with running statistics after the forward."""
    gen = torch.Generator().manual_seed(0)
    clients = 1 if way == "plain" else 2
    at = {
        n: torch.stack([t + 0.1 * torch.rand(t.shape, generator=gen) if t.is_floating_point() else t] * clients)
        for n, t in unit.state_dict().items()
    }
    at = {n: (t[0] if way in ("plain", "shared weights") else t).to(DEVICE) for n, t in at.items()}
    x = torch.randn(clients, 3, 4, 6, 6, generator=gen).to(DEVICE)
    x = x[0] if way == "plain" else x
    buffers = {n: t for n, t in at.items() if n in dict(unit.named_buffers())}
    live = {n: t.requires_grad_() for n, t in {"x": x, **at}.items() if n not in buffers}
    backend = {"level": level, "backend": "triton"} if level else {}

    def loss(live: dict[str, Tensor], rest: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        copies = {n: t.clone() for n, t in rest.items()}
        values = {n: t for n, t in live.items() if n != "x"}
        out = torch.func.functional_call(unit, {**values, **copies}, (live["x"],), backend)
        return out.sin().square().sum(), copies

    if way == "vmap of grad":
        plain = {n: t.detach() for n, t in live.items()}
        grads, changed = torch.vmap(torch.func.grad(loss, has_aux=True))(plain, buffers)
        return {**grads, **changed}
    dims = {n: 0 if n == "x" else None for n in live}
    stacked = torch.vmap(loss, in_dims=(dims, 0)) if way == "shared weights" else torch.vmap(loss)
    value, changed = loss(live, buffers) if way == "plain" else stacked(live, buffers)
    return {**dict(zip(live, torch.autograd.grad(value.sum(), list(live.values())), strict=True)), **changed}


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor, level: int = 0, backend: Any = "auto") -> Tensor:
        if level:
            return norm_relu(self.norm, x, Conv(), (self.conv.weight,), backend)[0]
        out: Tensor = self.conv(F.relu(self.norm(x)))
        return out


UNITS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: Block(4, 4, 1, "batch", 1.0),
    "group, strided": lambda: Block(4, 8, 2, "group", 1.0),
    "running": Running,
}


# running statistics of a stack are each client's own, so no weights are shared there
@pytest.mark.parametrize(
    ("name", "way"), [(n, w) for n in UNITS for w in WAYS if (n, w) != ("running", "shared weights")]
)
def test_blocks(name: str, way: str) -> None:
    unit = UNITS[name]().to(DEVICE)
    torch.manual_seed(0)
    stock, ours = gradients(unit, 0, way), gradients(unit, 1, way)
    assert stock.keys() == ours.keys()
    for n, t in stock.items():
        torch.testing.assert_close(ours[n], t, rtol=1e-4, atol=1e-5 * max(1.0, float(t.abs().max())))


def test_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once forward, once again and once backward for each norm; `kernels: reference` takes plain torch."""
    from fedpipe.kernels import norm as kernels

    called: list[str] = []
    for op in ("norm_relu", "norm_relu_again", "norm_relu_backward"):
        real = getattr(kernels, op)
        monkeypatch.setattr(kernels, op, lambda *a, _op=op, _real=real, **k: (called.append(_op), _real(*a, **k))[1])
    gradients(UNITS["batch"]().to(DEVICE), 1, "plain")
    assert sorted(called) == ["norm_relu"] * 2 + ["norm_relu_again"] * 2 + ["norm_relu_backward"] * 2
    called.clear()
    unit, x = UNITS["batch"]().to(DEVICE), torch.randn(2, 4, 4, 4, device=DEVICE, requires_grad=True)
    unit(x, level=1, backend="reference").sum().backward()
    assert not called
