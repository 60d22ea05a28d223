"""Masks as words: Triton's kernels and the reference, to the bit."""

from interpreter import DEVICE, poisoned  # noqa: F401, I001 (the interpreter is asked for first)

import statistics
import time
from collections.abc import Callable
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpipe.kernels import bits, sparse, topk
from fedpipe.kernels.aggregate import Part, weighted_mean
from fedpipe.kernels.step import step_

SHAPES = [(1,), (31,), (32,), (33,), (2047,), (2048,), (4129,), (3, 100), (2, 3, 65)]


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_unpack_and_count(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, device=DEVICE) < 0.3
    packed = bits.pack(mask, backend="triton")
    assert torch.equal(packed, bits.pack(mask, backend="reference"))
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 32))
    for backend in ("triton", "reference"):
        assert torch.equal(bits.unpack(packed, shape[-1], backend=backend), mask)
        assert torch.equal(bits.popcount(packed, backend=backend), mask.sum(-1))


def test_all_bits_of_a_word() -> None:
    mask = torch.ones(64, dtype=torch.bool, device=DEVICE)
    for backend in ("triton", "reference"):
        assert bits.pack(mask, backend=backend).tolist() == [-1, -1]
    assert bits.pack(torch.eye(32, dtype=torch.bool, device=DEVICE)).flatten().tolist() == [
        1 << i if i < 31 else -(1 << 31) for i in range(32)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(65,), (2049,), (3, 96)])
def test_threshold(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    x.view(-1)[1] = float("nan")
    t = (0.2 + torch.rand(shape[:-1], device=DEVICE)).to(dtype)
    keep = ~(x.abs() < t[..., None])
    ours, plain = x.clone(), x.clone()
    packed = bits.threshold_zero_(ours, t, backend="triton")
    assert torch.equal(packed, bits.threshold_zero_(plain, t, backend="reference"))
    assert torch.equal(packed, bits.pack(keep)) and 0 < int(keep.sum()) < keep.numel()
    assert torch.equal(ours.nan_to_num(7), plain.nan_to_num(7)) and bool(ours.view(-1)[1].isnan())
    assert torch.equal(ours.nan_to_num(7), torch.where(keep, x, 0).nan_to_num(7))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_unpack_is_the_inverse_of_pack(values: list[bool]) -> None:
    mask = torch.tensor(values, device=DEVICE)
    assert bits.unpack(bits.pack(mask), len(values)).tolist() == values


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bits.pack(torch.zeros(4)), "mask: torch.float32; wanted bool"),
        (lambda: bits.pack(torch.zeros(4, 4, dtype=torch.bool).T), "mask: not contiguous"),
        (lambda: bits.unpack(torch.zeros(2, dtype=torch.int32), 65), r"packed: shape \(2,\); wanted \(3,\)"),
        (lambda: bits.unpack(torch.zeros(2, dtype=torch.int64), 64), "packed: torch.int64; wanted int32"),
        (lambda: bits.unpack(torch.zeros(0, dtype=torch.int32), 0), "n: 0; wanted a number of entries"),
        (lambda: bits.threshold_zero_(torch.zeros(4), -1.0), "threshold: negative or NaN"),
        (lambda: bits.threshold_zero_(torch.zeros(4), float("nan")), "threshold: negative or NaN"),
        (lambda: bits.pack(torch.zeros(4, dtype=torch.bool), backend="cuda"), "backend: 'cuda'; wanted auto"),
    ],
)
def test_bad_input(call, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        call()


# ------------------------------------------------------------------------------------ on a CPU, beside what one writes
N, CLIENTS = 2**18, 10
SLOWER = 1.2  # times as slow as the naive expression at most: what noise is allowed
Call = Callable[[], object]
Calls = dict[str, tuple[Call, Call]]  # ours and the shortest torch expression for the same masks and precision


def unpacked(words: Tensor) -> Tensor:
    return ((words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).flatten() != 0


def packed(mask: Tensor) -> Tensor:
    return (mask.view(-1, 32).long() << torch.arange(32)).sum(1).int()


def of_steps() -> Calls:
    x, g, h, a, b = (torch.randn(4 * N) for _ in range(5))
    words = bits.pack(torch.rand(4 * N) < 0.3)

    def plain() -> None:
        x.sub_(g - h, alpha=0.1).mul_(unpacked(words))

    def everything() -> None:
        d = (g - h).add_(x - a, alpha=0.1).add_(x, alpha=0.01)
        x.sub_(b.mul_(0.9).add_(d), alpha=0.1).mul_(unpacked(words))

    told = {"anchor": a, "mu": 0.1, "weight_decay": 0.01, "momentum": 0.9, "buffer": b}
    return {
        "step": (lambda: step_(x, g, 0.1, mask=words, variate=h), plain),
        "everything": (lambda: step_(x, g, 0.1, mask=words, variate=h, **told), everything),  # type: ignore[arg-type]
    }


def of_masks() -> Calls:
    x, k, mask = torch.randn(N), N // 10, torch.rand(N) < 0.1
    words, values = bits.pack(mask), x[mask]

    def cut() -> Tensor:
        x.mul_(keep := x.abs() >= 0.1)
        return packed(keep)

    def largest() -> Tensor:
        return packed(torch.zeros(N, dtype=torch.bool).scatter_(0, x.abs().topk(k, sorted=False).indices, True))

    def spread() -> Tensor:
        return torch.zeros(N).masked_scatter_(unpacked(words), values)

    return {
        "pack": (lambda: bits.pack(mask), lambda: packed(mask)),
        "unpack": (lambda: bits.unpack(words, N), lambda: unpacked(words)),
        "popcount": (lambda: bits.popcount(words), lambda: unpacked(words).sum()),
        "threshold": (lambda: bits.threshold_zero_(x, 0.1), cut),
        "top-k": (lambda: topk.topk_mask(x, k), largest),
        "encode": (lambda: sparse.encode(x, words), lambda: x[unpacked(words)]),
        "decode": (lambda: sparse.decode(values, words, N), spread),
    }


def of_means() -> Calls:
    old = torch.randn(512, N // 512)
    full = [torch.randn_like(old) for _ in range(CLIENTS)]
    half, at = [x[:256].contiguous() for x in full], [slice(8 * c, 8 * c + 256) for c in range(CLIENTS)]
    words = [bits.pack(torch.rand(N) < 0.1) for _ in full]
    few = [sparse.encode(x.view(-1), w) for x, w in zip(full, words, strict=True)]

    def zeros() -> Tensor:
        return torch.zeros_like(old, dtype=torch.float64)

    def masked(values: list[Tensor]) -> Tensor:
        total, count = zeros(), zeros()
        for x, w in zip(values, words, strict=True):
            m = unpacked(w).view_as(old)
            total.add_(x * m if x.ndim > 1 else torch.zeros_like(old).masked_scatter_(m, x))
            count.add_(m)
        return torch.where(count > 0, total / count, old).float()

    def windows() -> Tensor:
        total, count = zeros(), zeros()
        for x, rows in zip(half, at, strict=True):
            total[rows] += x
            count[rows] += 1
        return torch.where(count > 0, total / count, old).float()

    def ours(values: list[Tensor], **keywords: bool) -> Call:
        parts = [Part(x, 1.0, w, **keywords) for x, w in zip(values, words, strict=True)]  # type: ignore[arg-type]
        return lambda: weighted_mean(old, parts)

    plain = [Part(x, 1.0) for x in full]
    moved = [Part(x, 1.0, windows=((0, rows.start, rows.stop),)) for x, rows in zip(half, at, strict=True)]
    return {
        "mean": (lambda: weighted_mean(old, plain), lambda: (reduce(Tensor.add_, full, zeros()) / CLIENTS).float()),
        "masked mean": (ours(full), lambda: masked(full)),
        "sparse mean": (ours(few, sparse=True), lambda: masked(few)),
        "windows": (lambda: weighted_mean(old, moved), windows),
    }


def slower(ours: Call, naive: Call) -> float:
    """How many times as long ours takes, in turn; of processor time, as others may use the processor too."""

    def seconds(call: Call) -> float:
        begin = time.thread_time()
        call()
        return time.thread_time() - begin

    return statistics.median(seconds(ours) / seconds(naive) for _ in range(11))


@pytest.mark.slow
def test_no_slower_on_a_cpu_than_the_naive_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one core, the best of 3 tries, which lie apart: a noisy moment does not spoil them all."""
    monkeypatch.undo()  # memory need not be poisoned here
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calls = of_steps() | of_masks() | of_means()
    tries = [{name: slower(*both) for name, both in calls.items()} for _ in range(3)]
    torch.set_num_threads(threads)
    assert {name: best for name in calls if (best := min(t[name] for t in tries)) > SLOWER} == {}
