"""Normalisation + ReLU: Triton's kernels against the reference, the reference against torch's in float64."""

from interpreter import DEVICE, poisoned  # noqa: F401, I001 (the interpreter is asked for first)

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedpipe.kernels.common import Backend
from fedpipe.kernels.norm import bytes_moved, norm_relu, norm_relu_again, norm_relu_backward

EPS = 1e-5
SHAPES: list[tuple[tuple[int, ...], int | None]] = [  # of x, and groups
    ((1, 1, 1), None), ((1, 5, 35), None), ((3, 5, 7, 5), None), ((33, 16, 8, 8), None), ((3, 2, 32, 32), None),
    ((33, 5), None), ((3, 5, 1, 1), None), ((2, 3, 40, 40), None),
    ((1, 1, 1), 1), ((1, 5, 35), 1), ((3, 6, 7, 5), 3), ((2, 16, 8, 8), 4), ((3, 4, 32, 32), 2), ((5, 6), 3),
    ((3, 3, 35), 3),
]  # fmt: skip
BACKENDS: tuple[Backend, ...] = ("triton", "reference")
Result = dict[str, Tensor]


def inputs(shape: tuple[int, ...], clients: int = 0, dtype: torch.dtype = torch.float32) -> Result:
    """Fresh random arguments by name; an offset and a scale of its own for every channel."""
    lead = (clients,) if clients else ()
    channels = (*lead, shape[1])
    each = (*lead, 1, shape[1], *[1] * (len(shape) - 2))
    x = torch.randn(*lead, *shape) * (0.5 + torch.rand(each)) + torch.randn(each)
    made = {"x": x, "dh": torch.randn_like(x), "weight": torch.randn(channels), "bias": torch.randn(channels)}
    return {n: t.to(DEVICE, dtype) for n, t in made.items()}


def ours(told: Result, groups: int | None, backend: Backend, known: Result | None = None) -> Result:
    """All that the three calls give; backward and recompute from statistics that are known, or forward's."""
    x, dh, weight, bias = (told[n] for n in ("x", "dh", "weight", "bias"))
    h, mean, rstd = norm_relu(x, weight, bias, EPS, groups, backend)
    m, r = (known["mean"], known["rstd"]) if known else (mean, rstd)
    again = norm_relu_again(x, m, r, weight, bias, groups, backend)
    dx, dweight, dbias = norm_relu_backward(dh, x, m, r, weight, bias, groups, backend)
    assert known or torch.equal(h, again)
    return {"h": h, "mean": mean, "rstd": rstd, "again": again, "dx": dx, "dweight": dweight, "dbias": dbias}


def torchs(told: Result, groups: int | None) -> Result:
    """h, dx, dweight and dbias by torch's own normalisation and autograd."""
    x, weight, bias = (told[n].clone().requires_grad_() for n in ("x", "weight", "bias"))
    if groups is None:
        h = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS).relu()
    else:
        h = F.group_norm(x, groups, weight, bias, EPS).relu()
    dx, dweight, dbias = torch.autograd.grad(h, (x, weight, bias), told["dh"])
    return {"h": h.detach(), "dx": dx, "dweight": dweight, "dbias": dbias}


def close(a: Result, b: Result, relative: float) -> None:
    """Equal but for a share of the largest entry, or of 1."""
    for name in a.keys() & b.keys():
        size = b[name].abs().max().clamp(min=1)
        assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype, name
        assert bool(((a[name] - b[name]).abs() <= relative * size).all()), name


def rounding(found: Result) -> float:
    """Of float32; dx is a difference times rstd, which is large where a few entries are nearly equal."""
    return 1e-6 * max(10, float(found["rstd"].max()))


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_against_the_reference(shape: tuple[int, ...], groups: int | None) -> None:
    told = inputs(shape)
    before = {n: t.clone() for n, t in told.items()}
    reference = ours(told, groups, "reference")
    close(ours(told, groups, "triton", reference), reference, rounding(reference))
    assert all(torch.equal(told[n], t) for n, t in before.items())
    assert reference["mean"].shape == ((shape[1],) if groups is None else (shape[0], groups))


@pytest.mark.parametrize(("shape", "groups"), [s for s in SHAPES if s[0] not in ((1, 1, 1), (3, 3, 35))])
def test_the_reference_is_torchs(shape: tuple[int, ...], groups: int | None) -> None:
    told = inputs(shape, dtype=torch.float64)
    close(ours(told, groups, "reference"), torchs(told, groups), 1e-10)
    assert torch.equal(norm_relu(told["x"], told["weight"], told["bias"], EPS, groups, "triton")[1],
                       ours(told, groups, "reference")["mean"])  # fmt: skip


@pytest.mark.parametrize("groups", [None, 2])
def test_again_gives_forwards_bits_and_so_does_a_repetition(groups: int | None) -> None:
    told = inputs((5, 6, 9, 30))
    for backend in BACKENDS:
        once, twice = (ours(told, groups, backend) for _ in range(2))  # h and again are compared there
        assert all(torch.equal(once[n], twice[n]) for n in once), backend


@pytest.mark.parametrize("groups", [None, 2])
def test_a_large_mean(groups: int | None) -> None:
    told = inputs((9, 4, 15, 15))
    told["x"] += 1000
    exact = ours({n: t.double() for n, t in told.items()}, groups, "reference")
    single = {n: t.float() for n, t in exact.items()}
    for backend in BACKENDS:
        found = ours(told, groups, backend, single)
        close({"mean": found["mean"]}, single, 2e-7)
        close({"rstd": found["rstd"]}, single, 1e-6)
        close({n: found[n] for n in ("h", "again")}, single, 1e-3)  # half a unit of a mean in float32 is 3e-5
        known = norm_relu_backward(told["dh"].double(), told["x"].double(), single["mean"].double(),
                                   single["rstd"].double(), told["weight"].double(), told["bias"].double(),
                                   groups)  # fmt: skip
        close(found, dict(zip(("dx", "dweight", "dbias"), (t.float() for t in known), strict=True)), 1e-5)


@pytest.mark.parametrize("groups", [None, 2])
def test_parts_of_many_tiles(groups: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and few programs: a program has several tiles, the last ones of the last not all there."""
    from fedpipe.kernels.norm import kernel

    told = inputs((5, 4, 7, 13))
    reference = ours(told, groups, "reference")
    for programs, most, block in ((12, 2, 32), (1, 1, 64)):
        for name, number in {"PROGRAMS": programs, "PARTS": most, "BLOCK": block, "TILE": 256}.items():
            monkeypatch.setattr(kernel, name, number)
        close(ours(told, groups, "triton", reference), reference, rounding(reference))


def test_64_bit_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpipe.kernels.norm import kernel

    planned = kernel._plan

    def wide(*arguments: Any) -> Any:
        plan = planned(*arguments)
        plan.constants["WIDE"] = True
        return plan

    for groups in (None, 2):
        told = inputs((3, 4, 5, 7))
        narrow = ours(told, groups, "triton")
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "_plan", wide)
            close(ours(told, groups, "triton", narrow), narrow, rounding(narrow))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "groups"), [((9, 5, 12, 12), None), ((3, 6, 8, 8), 3)])
def test_16_bits(shape: tuple[int, ...], groups: int | None, dtype: torch.dtype) -> None:
    """No further from what float32 gives for the same numbers than torch's own by twice."""
    low = inputs(shape, dtype=dtype)
    single = torchs({n: t.float() for n, t in low.items()}, groups)
    theirs = torchs(low, groups)
    for backend in BACKENDS:
        found = ours(low, groups, backend)
        # Triton's interpreter cuts off, cards round: a last place more.
        cut = 2**-7 if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu" else 0
        assert found["mean"].dtype == found["rstd"].dtype == torch.float32
        for name, want in single.items():
            error, limit = ((t[name].float() - want).abs() for t in (found, theirs))
            beyond = float((error - cut * want.abs()).max())
            assert found[name].dtype == dtype and beyond <= 2 * float(limit.max()) + 1e-5, (backend, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_in_float32_of_x_in_16_bits(backend: Backend) -> None:
    told = inputs((3, 4, 6))
    exact = ours({n: t.bfloat16().float() if n in ("x", "dh") else t for n, t in told.items()}, None, "reference")
    mixed = ours({n: t.bfloat16() if n in ("x", "dh") else t for n, t in told.items()}, None, backend)
    close({n: mixed[n] for n in ("mean", "rstd", "dweight", "dbias")}, exact, 1e-5)
    assert mixed["h"].dtype == mixed["dx"].dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (4, 6)])
def test_clients_are_on_their_own(shape: tuple[int, ...], groups: int | None) -> None:
    told = inputs(shape, clients=3)
    for backend in BACKENDS:
        together = ours(told, groups, backend)
        for i in range(3):
            alone = ours({n: t[i].contiguous() for n, t in told.items()}, groups, backend)
            close({n: t[i] for n, t in together.items()}, alone, 1e-6 if backend == "reference" else 0)


def test_a_nan_is_seen() -> None:
    for groups in (None, 2):
        told = inputs((3, 4, 5))
        told["x"][1, 2, 3] = float("nan")
        for backend in BACKENDS:
            h, *known = norm_relu(told["x"], told["weight"], told["bias"], EPS, groups, backend)
            dx, _, _ = norm_relu_backward(told["dh"], told["x"], *known, told["weight"], told["bias"], groups, backend)
            for t in (h, dx):
                assert bool(t[1, 2].isnan().all()) and not bool(t[:, :2].isnan().any())


def test_bytes_moved() -> None:
    assert bytes_moved("norm_relu", 1000) == 12000 and bytes_moved("norm_relu_again", 1000) == 8000
    assert bytes_moved("norm_relu_backward", 1000) == 20000 and bytes_moved("norm_relu_backward", 1000, 2) == 10000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(3, 4, 5, dtype=torch.int32)}, "x: torch.int32; wanted float32 or float64 or"),
        ({"x": torch.zeros(3, 5, 4).mT}, "x: not contiguous"),
        ({"x": torch.zeros(4)}, r"x: shape \(4,\); wanted \[batch, channels, ...\]"),
        ({"x": torch.zeros(0, 4)}, r"x: shape \(0, 4\); wanted"),
        ({"weight": torch.zeros(3, 4)}, r"weight: shape \(3, 4\); wanted \(3, 5\)"),
        ({"weight": torch.zeros(1, 1, 4)}, r"weight: shape \(1, 1, 4\); wanted \[channels\] or"),
        ({"weight": torch.zeros(4).half()}, "weight: torch.float16; wanted float32"),
        ({"bias": torch.zeros(5)}, r"bias: shape \(5,\); wanted \(4,\)"),
        ({"bias": torch.zeros(4).double()}, "bias: torch.float64; wanted float32"),
        ({"groups": 3}, "groups: 3; wanted a divisor of 4 channels"),
        ({"groups": 0}, "groups: 0; wanted a divisor"),
        ({"groups": 2}, r"mean: shape \(4,\); wanted \(3, 2\)"),
        ({"mean": torch.zeros(4).double()}, "mean: torch.float64; wanted float32"),
        ({"rstd": torch.zeros(8)[::2]}, "rstd: not contiguous"),
        ({"rstd": torch.zeros(4, device="meta")}, "rstd: on meta; wanted cpu"),
        ({"dh": torch.zeros(3, 4, 6)}, r"dh: shape \(3, 4, 6\); wanted \(3, 4, 5\)"),
        ({"dh": torch.zeros(3, 4, 5).bfloat16()}, "dh: torch.bfloat16; wanted float32"),
        ({"backend": "cuda"}, "backend: 'cuda'; wanted auto"),
    ],
)
def test_bad_input(change: dict[str, Any], said: str) -> None:
    names = ("mean", "rstd", "weight", "bias")
    told = {"dh": torch.zeros(3, 4, 5), "x": torch.zeros(3, 4, 5), **{n: torch.ones(4) for n in names}} | change
    with pytest.raises(ValueError, match=said):
        norm_relu_backward(**told)


def test_bad_eps() -> None:
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"eps: {eps}; wanted a number > 0"):
            norm_relu(torch.zeros(3, 4), torch.ones(4), torch.ones(4), eps)
