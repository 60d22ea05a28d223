"""Layer norm by liger's kernels: against torch's, in a ViT layer at every level, chosen and not chosen."""

from interpreter import DEVICE, poisoned  # noqa: F401, I001 (the interpreter is asked for first)

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedpipe.kernels import liger
from fedpipe.kernels.common import Backend
from fedpipe.models.chain import Chain
from fedpipe.models.norms import layer_norm
from fedpipe.models.vit import EPS, Layer, vit_tiny
from fedpipe.recompute import Policy

ops = pytest.importorskip("liger_kernel.ops.layer_norm", reason="liger-kernel is not installed")
SHAPES = [(1, 1), (1, 7), (3, 5, 35), (2, 3, 4, 48), (33, 192), (5, 257)]
CALLS = ("layer_norm_forward", "layer_norm_backward")


class Number(float):
    """A float that a kernel may convert, as compiled it may."""

    def to(self, dtype: Any) -> float:
        return self


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What liger takes for granted and Triton's interpreter lacks: libdevice's 1 / sqrt, numbers that are converted."""
    if DEVICE == "cpu":
        import triton.language as tl

        real = ops.layer_norm_forward
        monkeypatch.setattr(ops, "rsqrt", lambda x: tl.math.rsqrt(x))
        monkeypatch.setattr(ops, "layer_norm_forward", lambda x, w, b, eps: real(x, w, b, Number(eps)))


@pytest.fixture
def called(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of liger's calls, in order."""
    names: list[str] = []
    for name in CALLS:
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _n=name, _r=real, **k: (names.append(_n), _r(*a, **k))[1])
    return names


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """dy, weight, bias, and x with a mean and a deviation, 0.5 to 1.5, of its own in every row."""
    z, each = torch.randn(shape), (*shape[:-1], 1)
    z = (z - z.mean(-1, keepdim=True)) / z.std(-1, correction=0, keepdim=True).clamp(min=1e-3)
    x = z * (0.5 + torch.rand(each)) + torch.randn(each)
    made = {"x": x, "weight": torch.randn(shape[-1]), "bias": torch.randn(shape[-1]), "dy": torch.randn(shape)}
    return {n: t.to(DEVICE, dtype) for n, t in made.items()}


def both(told: dict[str, Tensor], backend: Backend) -> dict[str, Tensor]:
    """y and gradients of x, weight and bias."""
    live = [told[n].clone().requires_grad_() for n in ("x", "weight", "bias")]
    y = layer_norm(*live, EPS, backend)
    grads = torch.autograd.grad(y, live, told["dy"])
    return {"y": y.detach(), **dict(zip(("dx", "dweight", "dbias"), grads, strict=True))}


@pytest.mark.parametrize("shape", SHAPES)
def test_against_torchs(shape: tuple[int, ...], called: list[str]) -> None:
    told = inputs(shape)
    before = {n: t.clone() for n, t in told.items()}
    ours, theirs = both(told, "triton"), both(told, "reference")
    assert called == list(CALLS)
    # rounding of dx counts 1 / deviation times: 2 at most, and 1000 of a row of one entry
    each = 1e-5 * (1000 if shape[-1] == 1 else 1)
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, rtol=0, atol=each * max(1.0, float(want.abs().max())))
    assert all(torch.equal(told[n], t) for n, t in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 35), (33, 192)])
def test_16_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """No further from what float32 gives for the same numbers than torch's own by twice."""
    low = inputs(shape, dtype)
    single = both({n: t.float() for n, t in low.items()}, "reference")
    ours, theirs = both(low, "triton"), both(low, "reference")
    # Triton's interpreter cuts off, cards round: a last place more.
    cut = 2**-7 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0
    for name, want in single.items():
        error, limit = ((t[name].float() - want).abs() for t in (ours, theirs))
        beyond = float((error - cut * want.abs()).max())
        assert ours[name].dtype == dtype and beyond <= 2 * float(limit.max()) + 1e-5, name


def test_statistics_are_float32s_and_a_repetition_gives_the_same_bits() -> None:
    told = inputs((9, 48), torch.bfloat16)
    x, own = told["x"], (told["weight"], told["bias"])
    y, mean, rstd = liger.layer_norm(x, *own, EPS)
    assert mean.dtype == rstd.dtype == torch.float32 and mean.shape == rstd.shape == x.shape[:-1]
    torch.testing.assert_close(mean, x.float().mean(-1), rtol=0, atol=1e-6)
    assert torch.equal(y, liger.layer_norm(x, *own, EPS)[0])
    once, twice = (liger.layer_norm_backward(told["dy"], x, mean, rstd, own[0]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("has", [(0, 0, 0), (0, None, None), (None, 0, 0), (0, 0, None), (0, None, 0), (2, 1, 0)])
def test_stacks(has: tuple[int | None, ...], called: list[str]) -> None:
    """Where any of x, weight and bias has the client axis, and wherever it is, around vmap and in vmap of grad; one
    launch for all clients where they share the weights."""
    clients, told = 3, [inputs((4, 5, 6)) for _ in range(3)]
    given = [torch.stack([t[n] for t in told], d) if d is not None else told[0][n]
             for n, d in zip(("x", "weight", "bias"), has, strict=True)]  # fmt: skip

    def loss(backend: Backend) -> Callable[..., Tensor]:
        return lambda *t: layer_norm(*t, EPS, backend).sin().square().sum()

    def ways(backend: Backend) -> list[Tensor]:
        live = [t.detach().clone().requires_grad_() for t in given]
        value = torch.vmap(loss(backend), in_dims=has)(*live)
        inside = torch.vmap(torch.func.grad(loss(backend), argnums=(0, 1, 2)), in_dims=has)(*given)
        return [value.detach(), *torch.autograd.grad(value.sum(), live), *inside]

    ours, each = ways("triton"), clients if has[1:] != (None, None) else 1
    assert called.count(CALLS[0]) == 2 * each
    assert called.count(CALLS[1]) == each + clients  # inside vmap a shared weight has a gradient of every client
    for a, b in zip(ours, ways("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.abs().max())))


def test_clients_are_on_their_own() -> None:
    told = [inputs((3, 35)) for _ in range(3)]
    x, weight, bias, dy = (torch.stack([t[n] for t in told]) for n in ("x", "weight", "bias", "dy"))
    y, mean, rstd = liger.layer_norm(x, weight, bias, EPS)
    back = liger.layer_norm_backward(dy, x, mean, rstd, weight)
    for i in range(3):
        alone = liger.layer_norm(x[i], weight[i], bias[i], EPS)
        assert all(torch.equal(a[i], b) for a, b in zip((y, mean, rstd), alone, strict=True))
        grads = liger.layer_norm_backward(dy[i], x[i], *alone[1:], weight[i])
        assert all(torch.equal(a[i], b) for a, b in zip(back, grads, strict=True))


def gradients(way: str, level: int, backend: Backend) -> dict[str, Tensor]:
    """Gradients of the input and every parameter of a layer."""
    gen = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    unit, clients = Layer(12, 3, 24).to(DEVICE), () if way == "plain" else (2,)
    drawn = {n: (*clients, *p.shape) for n, p in unit.named_parameters()} | {"x": (*clients, 2, 3, 12)}
    live = {n: 0.3 * torch.randn(shape, generator=gen).to(DEVICE) for n, shape in drawn.items()}

    def loss(live: dict[str, Tensor]) -> Tensor:
        own = {n: t for n, t in live.items() if n != "x"}
        settings = {"level": level, "backend": backend}
        return torch.func.functional_call(unit, own, (live["x"],), settings).sin().square().sum()

    if way == "vmap of grad":
        return torch.vmap(torch.func.grad(loss))(live)
    live = {n: t.requires_grad_() for n, t in live.items()}
    value = loss(live) if way == "plain" else torch.vmap(loss)(live).sum()
    return dict(zip(live, torch.autograd.grad(value, list(live.values())), strict=True))


@pytest.mark.parametrize("way", ["plain", "around vmap", "vmap of grad"])
def test_layers_at_every_level(way: str, called: list[str]) -> None:
    """Within rounding of torch's; a level calls norms again in the backward, and on a CPU differs in no bit."""
    theirs, each = gradients(way, 0, "reference"), 1 if way == "plain" else 2
    assert not called
    ours = {}
    for level, forwards in ((0, 2), (1, 4), (2, 4)):
        ours[level] = gradients(way, level, "triton")
        assert sorted(called) == [CALLS[1]] * 2 * each + [CALLS[0]] * forwards * each
        called.clear()
        gradients(way, level, "reference")
        assert not called
    for n, want in theirs.items():
        torch.testing.assert_close(ours[0][n], want, rtol=1e-4, atol=1e-5 * max(1.0, float(want.abs().max())))
        for level in (1, 2):
            torch.testing.assert_close(ours[level][n], ours[0][n], rtol=0, atol=0.0 if DEVICE == "cpu" else 1e-4)


def test_a_policy_chooses_for_the_layers_that_have_a_level(called: list[str]) -> None:
    chain, x = Chain(vit_tiny((3, 8, 8), 10, depth=2, dim=12), (3, 8, 8)).to(DEVICE), torch.randn(2, 3, 8, 8)
    for backend, times in (("triton", 2), ("reference", 0)):
        chain(x.to(DEVICE), policy=Policy((("b1", 1),), (), backend))  # type: ignore[arg-type]
        assert called == [CALLS[0]] * times
        called.clear()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_layer_saves_as_much_as_with_torchs(backend: Backend) -> None:
    unit = Layer(192, 3, 768).to(DEVICE)
    x, own = torch.randn(1, 65, 192, device=DEVICE, requires_grad=True), {p.data_ptr() for p in unit.parameters()}

    def saved(level: int) -> float:
        kept: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            unit(x, level=level, backend=backend)
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own) / x.nbytes

    assert [saved(level) for level in (0, 1, 2)] == pytest.approx([16.0, 10.0, 6.0], abs=0.1)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    liger._ops.cache_clear()
    yield
    liger._ops.cache_clear()


def test_without_liger_torchs_runs(absent: None, called: list[str]) -> None:
    told = inputs((3, 5, 35))
    assert not liger.runs("triton", told["x"])
    ours, theirs = both(told, "triton"), both(told, "reference")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs) and not called


def test_what_it_runs_for() -> None:
    x = torch.zeros(3, 4, device=DEVICE)
    assert liger.runs("triton", x) and not liger.runs("reference", x)
    assert liger.runs("auto", x) == (DEVICE == "cuda")
    for other in (x.double(), x[:0], torch.zeros(1, liger.WIDEST + 1, device=DEVICE)):
        assert not liger.runs("triton", other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, "x: torch.float64; wanted float32 or bfloat16 or float16"),
        ({"x": torch.zeros(4, 3).mT}, "x: not contiguous"),
        ({"x": torch.zeros(0, 4)}, r"x: shape \(0, 4\); wanted \[..., dim\]"),
        ({"x": torch.zeros(1, 65537)}, r"x: shape \(1, 65537\); wanted \[..., dim\], none of them 0, dim at most"),
        ({"weight": torch.zeros(5)}, r"weight: shape \(5,\); wanted \(4,\)"),
        ({"weight": torch.zeros(2, 4)}, r"weight: shape \(2, 4\); wanted \(3, 4\)"),
        ({"weight": torch.zeros(1, 1, 4)}, r"weight: shape \(1, 1, 4\); wanted \[dim\] or \[clients, dim\]"),
        ({"weight": torch.zeros(4).half()}, "weight: torch.float16; wanted float32"),
        ({"mean": torch.zeros(4)}, r"mean: shape \(4,\); wanted \(3,\)"),
        ({"rstd": torch.zeros(3).double()}, "rstd: torch.float64; wanted float32"),
        ({"dy": torch.zeros(3, 5)}, r"dy: shape \(3, 5\); wanted \(3, 4\)"),
        ({"dy": torch.zeros(3, 4, device="meta")}, "dy: on meta; wanted cpu"),
    ],
)
def test_bad_input(change: dict[str, Any], said: str) -> None:
    told = {"dy": torch.zeros(3, 4), "x": torch.zeros(3, 4), "mean": torch.zeros(3), "rstd": torch.ones(3)}
    with pytest.raises(ValueError, match=said):
        liger.layer_norm_backward(**told | {"weight": torch.ones(4)} | change)


def test_bad_eps_and_bias() -> None:
    x, ones = torch.zeros(3, 4), torch.ones(4)
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"eps: {eps}; wanted a number > 0"):
            liger.layer_norm(x, ones, ones, eps)
    with pytest.raises(ValueError, match=r"bias: shape \(3,\); wanted \(4,\)"):
        liger.layer_norm(x, ones, torch.ones(3), EPS)


AOT = """
import json, sys
from aot import built
from fedpipe.kernels.common import Variant
from liger_kernel.ops import layer_norm as ops

backward = {"rows_per_program": 64, "COMPUTE_DW": True, "COMPUTE_DB": True}
for kind in ("fp32", "bf16"):
    for name, constants in (("forward", {}), ("backward", backward)):
        kernel = getattr(ops, f"_layer_norm_{name}_kernel")
        kinds = {n: "*fp32" if n.startswith(("Mean", "RSTD", "DW_", "DB_")) else "*" + kind for n in kernel.arg_names}
        types = {n: t if n.endswith("_ptr") else "fp32" if n == "eps" else "i32" for n, t in kinds.items()}
        made = built(Variant(kernel, types, {"BLOCK_SIZE": 256, **constants}), int(sys.argv[1]))
        print(json.dumps({"kernel": f"{name} {kind}", **made}))
"""


@pytest.mark.parametrize("sm", [80, 90])
def test_it_compiles_by_this_triton(sm: int, tmp_path: Path) -> None:
    """For rows of 192 entries, without a GPU; nothing is spilled."""
    here = Path(__file__).parent
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AOT, str(sm)], capture_output=True, text=True, timeout=300,
        env={**keep, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 4 and all(m["spills"] == 0 and m["registers"] <= 64 for m in found), found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_card(dtype: torch.dtype, called: list[str]) -> None:
    """A layer of ViT-Tiny for a batch of 32, by the setting a study has by default."""
    unit = Layer(192, 3, 768).cuda().to(dtype)
    x = torch.randn(32, 65, 192, device="cuda", dtype=dtype, requires_grad=True)
    live = [x, *unit.parameters()]
    for level in unit.levels:
        theirs = torch.autograd.grad(unit(x, level, "reference").square().sum(), live)
        assert not called
        ours = torch.autograd.grad(unit(x, level, "auto").square().sum(), live)
        assert called
        called.clear()
        for a, b in zip(ours, theirs, strict=True):
            error = float((a - b).abs().max() / b.abs().max())
            assert error < (1e-3 if dtype == torch.float32 else 3e-2)
    native = F.layer_norm(x, (192,), unit.norm1.weight, unit.norm1.bias, EPS)
    torch.testing.assert_close(layer_norm(x, unit.norm1.weight, unit.norm1.bias, EPS, "auto"), native)
