"""Sparse vectors: the entries of a vector that a mask marks, packed one after another, and back, to the bit.

A mask of n entries is int32 words (`common.py`), with the bits past n 0. Values travel as the integers they are stored
as: -0.0, denormals, infinities and the payloads of NaN stay what they were. `codec.py` makes messages of them.
"""

import torch
from torch import Tensor

from fedpipe.kernels import bits
from fedpipe.kernels.bits.reference import raw
from fedpipe.kernels.common import Backend, chosen, wanted
from fedpipe.kernels.common import words as words_of
from fedpipe.kernels.sparse import reference

INDEXABLE = 2**31  # entries that int32 indices reach
TYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
)


def encode(x: Tensor, words: Tensor, nnz: int | None = None, backend: Backend = "auto") -> Tensor:
    """Values [nnz] of the entries of x [n] whose bit in words [words(n)] is set, in ascending order.

    nnz: the number of set bits, where it is known: on a GPU nothing then waits for it to be counted, and a wrong one
    leaves entries out, or values unwritten. Raises ValueError for wrong types and shapes; off a GPU for a wrong nnz.
    """
    _from(x, words, nnz)
    return _code(backend, x).encode(raw(x), words, nnz).view(x.dtype)


def encode_indices(
    x: Tensor, words: Tensor, nnz: int | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """int32 indices [nnz], ascending, and values [nnz]; as `encode`, for n below 2**31."""
    _from(x, words, nnz)
    _indexable(x.numel())
    indices, values = _code(backend, x).encode_indices(raw(x), words, nnz)
    return indices, values.view(x.dtype)


def decode(values: Tensor, words: Tensor, n: int, backend: Backend = "auto") -> Tensor:
    """x [n] with values [nnz] at the entries whose bit in words [words(n)] is set, in order, and 0 elsewhere.

    Raises ValueError for wrong types and shapes; off a GPU, where it costs no waiting, for a wrong number of values.
    """
    wanted("values", values, TYPES, (values.numel(),))
    wanted("words", words, (torch.int32,), (words_of(n),), like=values)
    if not values.is_cuda and (found := count("words", words, n)) != values.numel():
        raise ValueError(f"values: {values.numel()}; wanted {found}, one for each bit of words that is set")
    return _code(backend, values).decode(raw(values), words, n).view(values.dtype)


def decode_indices(indices: Tensor, values: Tensor, n: int, backend: Backend = "auto") -> Tensor:
    """x [n] with values [nnz] at int32 indices [nnz] and 0 elsewhere, for n below 2**31.

    indices: in any order, each once. Raises ValueError for wrong types and shapes; off a GPU for indices outside too.
    """
    _indexable(n)
    wanted("values", values, TYPES, (values.numel(),))
    wanted("indices", indices, (torch.int32,), (values.numel(),), like=values)
    if not values.is_cuda:
        check_range("indices", indices, n)
    return _code(backend, values).decode_indices(indices, raw(values), n).view(values.dtype)


def bytes_moved(op: str, n: int, density: float, itemsize: int = 4) -> float:
    """Bytes one call must read and write for n entries, of which a share `density` is set."""
    mask = 0 if op == "decode_indices" else n / 8
    indices = 4 * density * n if op in ("encode_indices", "decode_indices") else 0
    return mask + indices + itemsize * (1 + density) * n


def count(name: str, words: Tensor, n: int) -> int:
    """Set bits of the words of n entries; raises ValueError where one is past n."""
    if n % 32 and int(words[-1]) >> (n % 32):
        raise ValueError(f"{name}: bits past entry {n - 1} are set; wanted 0 there")
    return int(bits.popcount(words))


def check_range(name: str, indices: Tensor, n: int) -> None:
    """Raise ValueError unless indices are in 0 .. n - 1."""
    if indices.numel():
        low, high = (int(i) for i in indices.aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"{name}: {low} to {high}; wanted 0 to {n - 1}")


def _from(x: Tensor, words: Tensor, nnz: int | None) -> None:
    wanted("x", x, TYPES, (x.numel(),))
    wanted("words", words, (torch.int32,), (words_of(x.numel()),), like=x)
    if nnz is not None and not x.is_cuda and (found := count("words", words, x.numel())) != nnz:
        raise ValueError(f"nnz: {nnz}; wanted {found}, the bits of words that are set")


def _indexable(n: int) -> None:
    if n >= INDEXABLE:
        raise ValueError(f"n: {n}; wanted fewer than 2**31 entries, or a mask instead of int32 indices")


def _code(backend: Backend, tensor: Tensor):  # type: ignore[no-untyped-def]
    if not chosen(backend, tensor):
        return reference
    from fedpipe.kernels.sparse import kernel

    return kernel
