"""Masks as words: Triton's kernels and the reference, to the bit."""

from interpreter import DEVICE, poisoned  # noqa: F401, I001 (the interpreter is asked for first)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe.kernels import bits

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
