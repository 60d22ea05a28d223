"""Sparse vectors: Triton's kernels and the reference, to the bit."""

from interpreter import DEVICE, poisoned  # noqa: F401, I001 (the interpreter is asked for first)

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe.kernels import bits, sparse

Tensor = torch.Tensor
SIZES = [1, 31, 33, 64, 2048, 2049, 33_001]  # the last: tiles are counted by more than one program
BACKENDS = ("triton", "reference")


def anything(n: int, dtype: torch.dtype) -> Tensor:
    """Every pattern of bits may come: NaN of all payloads, infinities, denormals, both zeros."""
    size = torch.empty(0, dtype=dtype).itemsize
    x = torch.randint(0, 256, (n * size,), dtype=torch.uint8, device=DEVICE)
    x[: n * size // 3] = 0
    return x.view(dtype)


def marked(n: int, density: float) -> tuple[Tensor, Tensor]:
    mask = torch.rand(n, device=DEVICE) < density
    return mask, bits.pack(mask, backend="reference")


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(sparse.raw(a), sparse.raw(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.7, 1.0])
def test_there_and_back(density: float, dtype: torch.dtype) -> None:
    for n in SIZES if density == 0.1 and dtype == torch.float32 else SIZES[1:-1:2]:
        x, (mask, words) = anything(n, dtype), marked(n, density)
        kept = torch.where(mask, sparse.raw(x), 0).view(dtype)
        for backend in BACKENDS:
            values = sparse.encode(x, words, backend=backend)
            assert same(values, x[mask])
            assert same(sparse.encode(x, words, nnz=len(values), backend=backend), values)
            assert same(sparse.decode(values, words, n, backend=backend), kept)
            indices, again = sparse.encode_indices(x, words, backend=backend)
            assert same(again, values) and indices.dtype == torch.int32
            assert indices.tolist() == mask.nonzero().flatten().tolist()
            assert same(sparse.decode_indices(indices, values, n, backend=backend), kept)


def test_wide_offsets() -> None:
    """The branch for more than 2**31 entries, at a size that can be had."""
    from fedpipe.kernels.sparse import kernel

    n, (mask, words) = 5000, marked(5000, 0.3)
    x, ends = torch.randn(n, device=DEVICE), kernel._ends(words)
    m = int(mask.sum())
    values, out, none = torch.empty(m, device=DEVICE), torch.empty(n, device=DEVICE), words[:0]
    grid, constants = (len(ends),), {"W": kernel.TILE, "WIDE": True}
    kernel.encode_kernel[grid](x, words, ends, values, none, n, len(words), m, AT=False, **constants)
    assert torch.equal(values, x[mask])
    kernel.decode_kernel[grid](values, words, ends, out, n, len(words), m, **constants)
    assert torch.equal(out, x * mask)


@pytest.mark.parametrize("wrong", [-40, 40])
def test_a_wrong_count_writes_nothing_outside(wrong: int) -> None:
    """As on a GPU, where nothing waits for the count to be checked."""
    from fedpipe.kernels.sparse import kernel

    n, (mask, words) = 5000, marked(5000, 0.3)
    x, m = torch.rand(n, device=DEVICE) + 1, int(mask.sum())
    values = kernel.encode(x, words, m + wrong)
    assert len(values) == m + wrong
    sure = min(m, m + wrong) - 31  # words that do not fit whole are left out
    assert torch.equal(values[:sure], x[mask][:sure])
    out = kernel.decode(values, words, n)
    assert torch.equal(out[mask][:sure], x[mask][:sure]) and bool((out[~mask] == 0).all())
    at = torch.tensor([-1, 3, n, n + 7], dtype=torch.int32, device=DEVICE)
    assert kernel.decode_indices(at, torch.ones(4, device=DEVICE), n).nonzero().tolist() == [[3]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(width=32)), min_size=1, max_size=200))
def test_decode_is_the_inverse_of_encode(entries: list[float | None]) -> None:
    x = torch.tensor([0.0 if v is None else v for v in entries], device=DEVICE)
    words = bits.pack(torch.tensor([v is not None for v in entries], device=DEVICE))
    assert same(sparse.decode(sparse.encode(x, words), words, len(x)), x)
    assert same(sparse.decode_indices(*sparse.encode_indices(x, words), len(x)), x)


ZEROS = torch.zeros(32, dtype=torch.int32)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: sparse.encode(ZEROS, ZEROS), r"words: shape \(32,\); wanted \(1,\)"),
    (lambda: sparse.encode(ZEROS.view(4, 8), ZEROS[:1]), r"x: shape \(4, 8\); wanted \(32,\)"),
    (lambda: sparse.encode(ZEROS, ZEROS[:1], nnz=1), "nnz: 1; wanted 0, the bits of words that are set"),
    (lambda: sparse.decode(ZEROS, ZEROS[:2], 64), "values: 32; wanted 0, one for each bit of words that is set"),
    (lambda: sparse.decode_indices(ZEROS + 64, ZEROS, 64), "indices: 64 to 64; wanted 0 to 63"),
    (lambda: sparse.decode_indices(ZEROS[:0], ZEROS[:0], 2**31), r"n: 2147483648; wanted fewer than 2\*\*31 entries"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "said"), BAD, ids=range(len(BAD)))
def test_bad_input(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
