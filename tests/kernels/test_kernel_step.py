"""The masked local step: Triton's kernel against float64, the reference against torch.optim.SGD to the bit."""

from interpreter import DEVICE, poisoned  # noqa: F401, I001 (the interpreter is asked for first)

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpipe.kernels import bits
from fedpipe.kernels.step import bytes_moved, step_
from fedpipe.kernels.step.backward import in_backward
from fedpipe.memory import Peak

LR, MU = 0.1, 0.7
SHAPES = [(1,), (33,), (2048,), (4129,), (3, 100), (2, 2080)]
CASES: dict[str, dict[str, Any]] = {
    "bare": {},
    "plain": {"mask": True, "variate": True},
    "shared": {"mask": "shared", "weight_decay": 5e-4},
    "proximal": {"anchor": True, "weight_decay": 5e-4},
    "first": {"mask": True, "momentum": 0.9, "first": True},
    "all": {"mask": True, "variate": True, "anchor": True, "momentum": 0.9, "weight_decay": 0.1},
}


def inputs(shape: tuple[int, ...], case: dict[str, Any], low: bool = False) -> tuple[dict[str, Any], Tensor | None]:
    """Arguments of a step on fresh random tensors, and the mask as bools; `low`: g and variate in bfloat16."""

    def fresh(rounded: bool = False) -> Tensor:
        t = torch.randn(shape, device=DEVICE)
        return t.bfloat16() if low and rounded else t

    told: dict[str, Any] = {k: v for k, v in case.items() if k in ("momentum", "weight_decay", "first")}
    told |= {"x": fresh(), "g": fresh(True), "lr": LR}
    if "variate" in case:
        told["variate"] = fresh(True)
    if "anchor" in case:
        told |= {"anchor": fresh(), "mu": MU}
    if "momentum" in case:
        told["buffer"] = torch.full(shape, float("nan"), device=DEVICE) if case.get("first") else fresh()
    mask = None
    if "mask" in case:
        mask = torch.rand(shape[-1:] if case["mask"] == "shared" else shape, device=DEVICE) < 0.4
        told["mask"] = bits.pack(mask)
    return told, mask


def copies(told: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same arguments again, in another type where one is given."""
    return {
        k: (v.clone() if k == "mask" or dtype is None else v.to(dtype, copy=True)) if isinstance(v, Tensor) else v
        for k, v in told.items()
    }


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, ...], name: str, low: bool) -> None:
    told, mask = inputs(shape, CASES[name], low)
    exact = copies(told, torch.float64)
    read = {n: t for n, t in exact.items() if n in ("x", "g", "variate", "anchor", "buffer")}
    if "first" in exact:
        del read["buffer"]
    size = sum(t.abs() for t in read.values())
    step_(**exact)
    before = {k: v.clone() for k, v in told.items() if isinstance(v, Tensor)}
    for backend in ("triton", "reference"):
        ours = copies(told)
        assert step_(**ours, backend=backend) is ours["x"]
        for written in ("x", "buffer") if "buffer" in ours else ("x",):
            assert bool(((ours[written].double() - exact[written]).abs() <= 1e-6 * size).all()), (backend, written)
        if mask is not None:
            assert bool((ours["x"][~mask.expand(shape)] == 0).all())
        assert all(torch.equal(ours[k], v) for k, v in before.items() if k not in ("x", "buffer"))


def test_an_entry_that_is_masked_is_0_whatever_it_was() -> None:
    for backend in ("triton", "reference"):
        for dtype in (torch.float32, torch.float64):
            x = torch.tensor([float("nan"), 3e38, -1.0, 2.0], device=DEVICE, dtype=dtype)
            mask = bits.pack(torch.tensor([False, False, False, True], device=DEVICE))
            step_(x, torch.ones_like(x), 0.5, mask=mask, backend=backend)
            assert x.tolist() == [0, 0, 0, 1.5] and not bool(x.signbit().any())


@pytest.mark.parametrize("n", [7, 3 * bits.reference.CHUNK + 45])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 5e-4])
def test_the_reference_is_sgd_to_the_bit(n: int, momentum: float, decay: float) -> None:
    x, h, a = torch.randn(3, n)
    keep = torch.rand(n) < 0.5
    leaf = x.clone().requires_grad_()
    opt = torch.optim.SGD([leaf], lr=LR, momentum=momentum, weight_decay=decay)
    buffer = torch.empty(n) if momentum else None
    for k in range(3):
        g = torch.randn(n)
        leaf.grad = g - h + MU * (leaf.detach() - a)
        opt.step()
        with torch.no_grad():
            leaf.mul_(keep)
        step_(x, g, LR, mask=bits.pack(keep), variate=h, anchor=a, mu=MU, momentum=momentum, weight_decay=decay,
              buffer=buffer, first=k == 0)  # fmt: skip
        assert torch.equal(x, leaf.detach())
    assert buffer is None or torch.equal(buffer, opt.state[leaf]["momentum_buffer"])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 300), st.booleans())
def test_rows_are_clients_on_their_own(clients: int, n: int, shared: bool) -> None:
    told, mask = inputs((clients, n), {**CASES["all"], "mask": "shared" if shared else True})
    ours = copies(told)
    step_(**ours, backend="reference")
    for i in range(clients):
        row = {k: v[i] if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in told.items()}
        assert torch.equal(step_(**copies(row), backend="reference"), ours["x"][i])


def test_large_rows_are_stepped_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    told, _ = inputs((3, 500), CASES["all"])
    whole = step_(**copies(told), backend="reference")
    for chunk in (64, 512, 1024):
        monkeypatch.setattr(bits.reference, "CHUNK", chunk)
        assert torch.equal(step_(**copies(told), backend="reference"), whole)


def test_bytes_moved() -> None:
    assert bytes_moved(1000) == 16125
    assert bytes_moved(1000, momentum=True) == 24125
    assert bytes_moved(1000, variate=False, anchor=True) == 16125
    assert bytes_moved(1000, itemsize=2) == 12125
    assert bytes_moved(1000, mask=False, variate=False) == 12000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"g": torch.zeros(64, dtype=torch.float16)}, "g: torch.float16; wanted float32 or bfloat16"),
        ({"x": torch.zeros(64, dtype=torch.bfloat16)}, "x: torch.bfloat16; wanted float32 or float64"),
        ({"anchor": torch.zeros(64).double()}, "anchor: torch.float64; wanted float32"),
        ({"variate": torch.zeros(65)}, r"variate: shape \(65,\); wanted \(64,\)"),
        ({"mask": torch.zeros(64, dtype=torch.bool)}, "mask: torch.bool; wanted int32"),
        ({"mask": torch.zeros(3, dtype=torch.int32)}, r"mask: shape \(3,\); wanted \(2,\)"),
        ({"g": torch.zeros(128)[::2]}, "g: not contiguous"),
        ({"momentum": 0.9}, "buffer: none with momentum 0.9; wanted both or neither"),
        ({"buffer": torch.zeros(64)}, "buffer: one with momentum 0.0; wanted both or neither"),
        ({"mu": 0.1}, "anchor: none with mu 0.1; wanted a tensor"),
        ({"backend": "cuda"}, "backend: 'cuda'; wanted auto"),
    ],
)
def test_bad_input(change: dict[str, Any], said: str) -> None:
    told = {"x": torch.ones(64), "g": torch.ones(64), "lr": 0.1} | change
    x = told["x"].clone()
    with pytest.raises(ValueError, match=said):
        step_(**told)
    assert torch.equal(told["x"], x)


# ---------------------------------------------------------------------------------------------------- inside backward
LAYERS, SIDE = 8, 96
GRADIENT = 4 * SIDE**2  # bytes of one layer's


def net() -> nn.Module:
    """A chain of equal layers; the first is used twice."""
    layers = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
    return nn.Sequential(*layers, layers[0]).to(DEVICE)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_in_backward_is_the_step_after_backward(momentum: float) -> None:
    model, x = net(), torch.randn(5, SIDE, device=DEVICE)
    twin = copy.deepcopy(model)
    inside, after = (dict(m.named_parameters()) for m in (model, twin))
    told = {n: inputs((p.numel(),), {"mask": True, "variate": True, "anchor": True})[0] for n, p in inside.items()}
    named = {kind: {n: told[n][kind] for n in told if n != "3.weight"} for kind in ("mask", "variate", "anchor")}
    numbers = {"momentum": momentum, "weight_decay": 0.1}
    buffers = {n: torch.empty(p.numel(), device=DEVICE) for n, p in after.items()} if momentum else {}
    handle = None
    for k in range(2):
        handle = in_backward(inside, LR, **named, mu=MU, **numbers, buffers=handle.buffers if handle else None)
        with handle:
            model(x).square().mean().backward()
        twin(x).square().mean().backward()
        for n, p in after.items():
            assert p.grad is not None
            more = {kind: given.get(n) for kind, given in named.items()} | {"buffer": buffers.get(n)}
            mu = MU if n in named["anchor"] else 0.0
            step_(p.detach().view(-1), p.grad.view(-1), LR, **more, mu=mu, **numbers, first=k == 0)
            p.grad = None
            assert torch.equal(p, inside[n]) and inside[n].grad is None
    model(x).sum().backward()
    assert all(p.grad is not None for p in inside.values()), "hooks are gone after the block"


def test_in_backward_holds_one_gradient_at_a_time() -> None:
    model, x = net(), torch.randn(1, SIDE, device=DEVICE)
    parameters = dict(model.named_parameters())
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(p.grad.nbytes for p in parameters.values() if p.grad is not None))

    for p in parameters.values():
        p.register_post_accumulate_grad_hook(count)

    def rise() -> int:
        with Peak(device=DEVICE) as peak:
            model(x).square().mean().backward()
        return peak.bytes

    with in_backward(parameters, LR):
        stepped = rise()
    assert alive == [GRADIENT] * LAYERS
    assert rise() >= LAYERS * GRADIENT
    # the shared layer's first gradient waits for its second, and one more is being made
    assert stepped <= 3 * GRADIENT + 32 * x.nbytes


def test_in_backward_refuses() -> None:
    leaf = torch.zeros(4, requires_grad=True)
    for said, call in {
        "variate: b; wanted names": lambda: in_backward({"a": leaf}, LR, variate={"b": leaf}),
        "a: no contiguous leaf": lambda: in_backward({"a": leaf * 2}, LR),
    }.items():
        with pytest.raises(ValueError, match=said):
            call()
