"""The weighted mean over those who hold an entry: Triton's fold, the reference, and the definition in float64."""

from interpreter import DEVICE, poisoned  # noqa: F401, I001 (the interpreter is asked for first)

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpipe.kernels import bits
from fedpipe.kernels.aggregate import Fold, Part, bytes_moved, held, region, weighted_mean

SHAPES: list[tuple[int, ...]] = [(), (1,), (33,), (512,), (1025,), (6, 5), (8, 6, 3, 3)]
Masks = list["Tensor | None"]


def parts_of(shape: tuple[int, ...], clients: int, kind: str) -> list[Part]:
    """Clients of one kind, or of all kinds in turn; some entries nobody holds where they are masked."""
    out = []
    for c in range(clients):
        now = ("plain", "masked", "window", "sparse", "masked window")[c % 5] if kind == "mixed" else kind
        windows = []
        if "window" in now:
            for d in range(min(2, len(shape))):
                size = max(1, shape[d] // 2)
                start = (c + d) % shape[d]
                windows.append((d, start, start + size))  # past the end in some: it wraps round
        size = held(torch.Size(shape), windows)
        values = torch.randn(size, device=DEVICE)
        mask = None
        if now not in ("plain", "window"):
            on = torch.rand(size, device=DEVICE) < 0.15
            mask = bits.pack(on.flatten())
            values = values[on] if now == "sparse" else values
        out.append(Part(values, float(c % 4 + 1), mask, tuple(windows), now == "sparse"))
    return out


def defined(old: Tensor, parts: list[Part]) -> Tensor:
    """The mean as it is defined, one client's whole tensors at a time."""
    total, weight = torch.zeros_like(old, dtype=torch.float64), torch.zeros_like(old, dtype=torch.float64)
    for p in parts:
        at = region(old.shape, p.windows)
        size = total[at].shape
        on = torch.ones(size, dtype=torch.bool, device=DEVICE)
        if p.mask is not None:
            on = bits.unpack(p.mask, on.numel()).view(size)
        full = torch.zeros(size, dtype=torch.float64, device=DEVICE)
        full[on] = (p.values if p.sparse else p.values[on]).double()
        total[at] += p.weight * full
        weight[at] += p.weight * on
    return torch.where(weight > 0, total / weight, old.double()).to(old.dtype)


@pytest.mark.parametrize("kind", ["plain", "masked", "window", "sparse", "masked window", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind(shape: tuple[int, ...], kind: str) -> None:
    old = torch.randn(shape, device=DEVICE)
    parts = parts_of(shape, 7, kind)
    want = defined(old, parts)
    for backend in ("triton", "reference"):
        assert torch.equal(weighted_mean(old, parts, backend=backend), want), backend  # whole weights: sums are exact
    if "masked" in kind and want.numel() > 100:
        assert 0 < int((want == old).sum()) < want.numel(), "some entries nobody holds"


def test_more_clients_than_a_launch_takes() -> None:
    """Sums carried from launch to launch give the bits of one launch."""
    from fedpipe.kernels.aggregate import kernel

    old = torch.randn(700, device=DEVICE)
    parts = parts_of((700,), 2 * kernel.MANY + 3, "masked")
    want = weighted_mean(old, parts, backend="triton")
    assert torch.equal(want, defined(old, parts))
    few = pytest.MonkeyPatch()
    few.setattr(kernel, "MANY", 3)
    assert torch.equal(weighted_mean(old, parts, backend="triton"), want)
    few.undo()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_repetition_gives_the_same_bits_and_order_hardly_matters(backend: str) -> None:
    old = torch.randn(900, device=DEVICE)
    parts = [p._replace(weight=p.weight + 0.1 * i) for i, p in enumerate(parts_of((900,), 9, "masked"))]
    once = weighted_mean(old, parts, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(once, weighted_mean(old, parts, backend=backend))  # type: ignore[arg-type]
    other = weighted_mean(old, parts[::-1], backend=backend)  # type: ignore[arg-type]
    assert torch.allclose(once, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    old = torch.randn(300, device=DEVICE).to(dtype)
    parts = [p._replace(values=p.values.to(dtype)) for p in parts_of((300,), 4, "masked")]
    want = defined(old, parts)
    assert torch.equal(weighted_mean(old, parts, backend="reference"), want)
    ours = weighted_mean(old, parts, backend="triton")
    last_place = 2**-7 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0  # the interpreter cuts off, cards round
    assert torch.allclose(ours, want, rtol=last_place, atol=0) and ours.dtype == dtype


def test_a_view_from_the_midst_of_a_buffer() -> None:
    """The kernel loads 16 bytes at a time: values that do not begin at a multiple of that are copied first."""
    old, buffer = torch.randn(64, device=DEVICE), torch.randn(65, device=DEVICE)
    fold = Fold(old, backend="triton")
    fold.add(Part(buffer[1:], 1.0))
    (waiting,) = fold.fold.waiting
    assert buffer[1:].data_ptr() % 16 and waiting.values.data_ptr() % 16 == 0
    assert torch.equal(fold.result(), buffer[1:])


def test_nobody() -> None:
    old = torch.randn(5, device=DEVICE)
    for backend in ("triton", "reference"):
        out = weighted_mean(old, [], backend=backend)
        assert torch.equal(out, old) and out.data_ptr() != old.data_ptr()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(1, 6), st.randoms(use_true_random=False))
def test_order_of_clients(n: int, clients: int, random) -> None:  # type: ignore[no-untyped-def]
    old = torch.randn(n, device=DEVICE)
    parts = parts_of((n,), clients, "masked")
    other = random.sample(parts, len(parts))
    a, b = (weighted_mean(old, p, backend="reference") for p in (parts, other))
    assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_bytes() -> None:
    assert bytes_moved(1, 10) == 49.25 and bytes_moved(1, 10, density=0.1) == pytest.approx(13.25)


OLD = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (lambda: Part(torch.zeros(4, 3), 0.0), "client 0: weight 0.0; wanted a number > 0"),
        (lambda: Part(torch.zeros(4, 3), float("nan")), "client 0: weight nan; wanted"),
        (lambda: Part(torch.zeros(4, 2), 1.0), r"client 0: values: shape \(4, 2\); wanted \(4, 3\)"),
        (lambda: Part(torch.zeros(4, 3).double(), 1.0), "client 0: values: torch.float64; wanted float32"),
        (lambda: Part(torch.zeros(3, 4).T, 1.0), "client 0: values: not contiguous"),
        (lambda: Part(torch.zeros(2, 3), 1.0, windows=((0, 0, 5),)), "client 0: window 0..5 of dimension 0; wanted"),
        (lambda: Part(torch.zeros(2, 3), 1.0, windows=((2, 0, 1),)), "client 0: window 0..1 of dimension 2; wanted"),
        (lambda: Part(torch.zeros(4, 3), 1.0, torch.zeros(2, dtype=torch.int32)), r"mask: shape \(2,\); wanted \(1,\)"),
        (lambda: Part(torch.zeros(2), 1.0, sparse=True), "client 0: sparse without a mask"),
        (lambda: Part(torch.zeros(2), 1.0, torch.ones(1, dtype=torch.int32), sparse=True), r"wanted \(1,\)"),
    ],
)
def test_bad_input(part: Callable[[], Part], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Fold(OLD).add(part())
