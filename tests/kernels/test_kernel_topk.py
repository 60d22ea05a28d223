"""Exact Top-K: Triton's kernels against the reference, to the bit, and the reference against a plain sort."""

from interpreter import DEVICE, poisoned  # noqa: F401, I001 (the interpreter is asked for first)

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedpipe.kernels import bits, topk
from fedpipe.kernels.topk import kernel, layout, reference
from fedpipe.kernels.topk.collect import AGAIN
from fedpipe.kernels.topk.place import EACH

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INPUTS = {
    "normal": lambda n: torch.randn(n),
    "eighths": lambda n: (torch.randn(n) * 8).round() / 8,
    "equal": lambda n: torch.full((n,), -1.5),
    "zero": lambda n: torch.zeros(n),
    "heavy": lambda n: torch.randn(n).exp() ** 4 * torch.randn(n).sign(),
    "denormal": lambda n: torch.randn(n) * 1e-40,
    "infinite": lambda n: torch.where(torch.rand(n) < 0.3, torch.inf, torch.randn(n)),
    "cut before": lambda n: torch.randn(n) * (torch.rand(n) < 0.1),
}


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The flags of each attempt; samples are small, so that buffers of a few tiles are not sampled whole."""
    said: list[int] = []
    tried = kernel.tried

    def noted(*arguments: object) -> tuple[Tensor, int, Tensor]:
        packed, flags, following = tried(*arguments)  # type: ignore[arg-type]
        said.append(flags)
        return packed, flags, following

    monkeypatch.setattr(kernel, "SAMPLE", 1024)
    monkeypatch.setattr(kernel, "tried", noted)
    yield said


def sorted_mask(x: Tensor, k: int) -> Tensor:
    """The plainest Top-K there is: a stable sort puts ties in the order of their indices."""
    order = x.double().abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros(x.shape, dtype=torch.bool, device=x.device).scatter_(-1, order, True)


def check(x: Tensor, k: int | list[int], sizes: list[int] | None = None, backend: str = "triton") -> topk.Kept:
    """Against the sort, and the threshold the k-th largest; the second run, which zeroes in place, gives the same."""
    ours = topk.topk_mask(x, k, sizes, backend=backend)
    parts = [x] if sizes is None else list(x.split(sizes, -1))
    counts = [k] if isinstance(k, int) else k
    keep = torch.cat([sorted_mask(part, count) for part, count in zip(parts, counts, strict=True)], -1)
    assert torch.equal(ours.words, bits.pack(keep))
    kth = [
        p.abs().sort(dim=-1, descending=True).values[..., c - 1] if c else torch.full_like(p[..., 0], torch.inf)
        for p, c in zip(parts, counts, strict=True)
    ]
    assert torch.equal(ours.threshold, kth[0] if sizes is None else torch.stack(kth, -1))
    zeroed = x.clone()
    assert torch.equal(topk.topk_zero_(zeroed, k, sizes, backend=backend).words, ours.words)
    assert torch.equal(zeroed, torch.where(keep, x, 0))
    return ours


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("kind", INPUTS)
def test_reference(kind: str, dtype: torch.dtype) -> None:
    for n in (1, 33, 4129):
        x = INPUTS[kind](n).to(dtype).to(DEVICE)
        for k in {0, 1, n // 100, n // 10, n // 2, n}:
            check(x, min(k, n), backend="reference")
            key = reference.keys(x)[None]
            keep = torch.zeros(key.shape, dtype=torch.bool, device=DEVICE)
            if k:
                reference.by_topk(key, min(k, n), keep)
            assert torch.equal(keep[0], sorted_mask(x, min(k, n)))
    clients = INPUTS[kind](3 * 400).view(3, 400).to(dtype).to(DEVICE)
    check(clients, [7, 0, 50, 33], [100, 17, 250, 33], backend="reference")


@pytest.mark.parametrize("kind", INPUTS)
def test_global(kind: str, attempts: list[int]) -> None:
    n = 5_011
    x = INPUTS[kind](n).to(DEVICE)
    for k in (n // 10, n):
        check(x, k)
    assert kind == "cut before" or not attempts[0] & AGAIN.value


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("kind", ["normal", "heavy", "infinite"])
def test_half_precision(kind: str, dtype: torch.dtype, attempts: list[int]) -> None:
    check(INPUTS[kind](5_011).to(dtype).to(DEVICE), 501)
    assert not attempts[0] & AGAIN.value


def test_density_and_shape(attempts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (1, 32, 33, 4097):
        check(torch.randn(n, device=DEVICE), -(-n // 10))
    check(torch.randn(3, 2500, device=DEVICE), 250)
    check(torch.randn(3, 25, device=DEVICE), 0)
    monkeypatch.setattr(kernel, "SAMPLE", 8192)
    for d in (0.5, 0.01, 0.001):
        check(torch.randn(16_385, device=DEVICE), int(16_385 * d))
    assert not any(said & AGAIN.value for said in attempts)


def test_layers(attempts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments within a word, across tiles, sampled whole and not, for several clients."""
    monkeypatch.setattr(kernel, "SAMPLE", 4096)
    sizes = [1, 2, 64, 6000, 300, 1, 4096 - 1, 33]
    x = torch.randn(2, sum(sizes), device=DEVICE)
    check(x, [size // 10 for size in sizes], sizes)
    check((x * 8).round() / 8, [1, 0, 64, 100, 3, 1, 3000, 33], sizes)
    check(x[0].bfloat16(), [1, 2, 3, 600, 5, 1, 7, 8], sizes)
    assert len(attempts) == 6 and not any(said & AGAIN.value for said in attempts)


def test_layers_at_borders_of_tiles(attempts: list[int]) -> None:
    sizes = [4096, 4096, 4096 * 6, 4096, 1]
    check(torch.randn(sum(sizes), device=DEVICE), [400, 41, 200, 4096, 1], sizes)
    assert not attempts[0] & AGAIN.value


def test_many_programs_sample(attempts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of what several programs find brackets as well; the samples of all are other ones."""
    monkeypatch.setattr(kernel, "SAMPLE", 256)
    x = torch.randn(33_000, device=DEVICE)
    check(x, 330)
    check(x.bfloat16(), 330)
    assert not any(said & AGAIN.value for said in attempts)


@pytest.mark.parametrize("bracket", [(0.01, 0.02), (5.0, 6.0), (0.0, 0.0), (torch.inf, torch.inf)])
@pytest.mark.parametrize("layers", [False, True])
def test_missed_bracket(
    layers: bool, bracket: tuple[float, float], attempts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies on the side of a bracket where the threshold is proved to be is split again."""
    wrong = torch.tensor(bracket, device=DEVICE).view(torch.int32)
    monkeypatch.setattr(kernel, "sampled", lambda task: wrong.repeat(task.groups, 1))
    k, sizes = ([1000, 100], [9_000, 3_000]) if layers else (1000, None)
    check(torch.randn(12_000, device=DEVICE), k, sizes)
    assert attempts[0] == AGAIN.value and 2 <= len(attempts) // 2 <= 4


def test_one_value_is_most_of_what_is_undecided(attempts: list[int]) -> None:
    """A buffer cut before: the threshold is the least that was kept, or zero, which there is no room for."""
    x = torch.randn(100_000, device=DEVICE)
    topk.topk_zero_(x, 1000)
    attempts.clear()
    check(x, 1000)
    check(x, 1001)
    assert attempts == [AGAIN.value, 0] * 4


def test_too_many_candidates(attempts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bin that holds the threshold is the next bracket."""
    monkeypatch.setattr(kernel, "EXTRA", 80)
    monkeypatch.setattr(layout, "ROOM", 10)
    check(torch.randn(9_001, device=DEVICE), 900)
    assert attempts[0] == AGAIN.value and not attempts[1] & AGAIN.value


def test_tiles_with_too_many_for_their_slots(attempts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read again, in the same attempt."""
    monkeypatch.setattr(kernel, "LANES", 64)
    x = torch.randn(2, 9_001, device=DEVICE)
    asked: list[tuple[int, int]] = []
    real = kernel.cut

    def cut(task: kernel.Task, bracket: Tensor) -> kernel.Cut:
        made = real(task, bracket)
        asked.append((task.cap, int(made.filled.max())))
        return made

    monkeypatch.setattr(kernel, "cut", cut)
    check(x, [500, 300], [5_000, 4_001])
    check(x[0], 900)
    assert not any(attempts) and all(cap == 64 < most for cap, most in asked)


def test_a_bin_with_too_many(attempts: list[int]) -> None:
    """A value that many share, in the midst of a bracket, and many values that are close: candidates are read again."""
    x = torch.randn(60_000, device=DEVICE)
    x[torch.rand_like(x) < 0.02] = 1.7
    assert int((x == 1.7).sum()) > 2**9  # more than are listed
    check(x, int((x.abs() > 1.7).sum()) + 300)
    x[: len(x) // 2] += torch.rand(len(x) // 2, device=DEVICE) * 1e-6
    check(x, int((x.abs() > 1.7).sum()) - 300)
    assert not any(attempts)


def test_ties_in_tiles_before(attempts: list[int]) -> None:
    """Ties are counted over several tiles, and the last that stay are in the midst of one."""
    n = 3 * EACH * 4096
    x = torch.ones(n, device=DEVICE)
    for k in (1, n // 2 + 7, n - 1, n):
        kept = bits.unpack(topk.topk_mask(x, k, backend="triton").words, n)
        assert kept[:k].all() and not kept[k:].any()
    assert attempts.count(0) == 4


class Allocated(TorchDispatchMode):
    """Bytes of every tensor that an operator makes, alive or not: no less than the peak. Triton's interpreter copies
    what kernels are given, into tensors that it fills by `set_`: they are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[Tensor, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                made = 0 if func.overloadpacket is torch.ops.aten.set_ else t.untyped_storage().nbytes()
                self.seen.setdefault(t.untyped_storage().data_ptr(), (t, made))
        return out

    @property
    def bytes(self) -> int:
        return sum(made for _, made in self.seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory(dtype: torch.dtype) -> None:
    n, size = 100_000, dtype.itemsize
    x = torch.randn(n, device=DEVICE).to(dtype)
    with Allocated() as made:
        topk.topk_mask(x, n // 10, backend="triton")
    settling = 2**9 * (4 + 8 + 8) + n // 4 * (size + 4)
    slots = -(-n // 4096) * 256 * (size + 2)
    assert n / 4 + settling + slots < made.bytes - x.nbytes < n / 4 + settling + slots + 10_000
    for entries in (2**20, 2**28, 10**9):
        at = layout.layout((entries,), (1,), 4096, kernel.EXTRA // (size + 4), torch.device("cpu"))
        assert at.room * (size + 4) + 2**12 * 20 <= 64 * 2**20


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_properties(backend: str, data: st.DataObject) -> None:
    """Exactly k bits; nothing dropped is above what is kept; cutting twice cuts the same."""
    values = data.draw(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=120))
    k = data.draw(st.integers(0, len(values)))
    x = torch.tensor(values, dtype=torch.float32, device=DEVICE)
    kept = topk.topk_zero_(cut := x.clone(), k, backend=backend)
    mask = bits.unpack(kept.words, len(values))
    assert int(bits.popcount(kept.words)) == k
    if 0 < k < len(values):
        assert x[mask].abs().min() >= x[~mask].abs().max() and x[mask].abs().min() == kept.threshold
    assert torch.equal(x[mask], cut[mask]) and not cut[~mask].any()
    again = bits.unpack(topk.topk_mask(cut, k, backend=backend).words, len(values))
    assert torch.equal(cut[again].sort().values, x[mask].sort().values)
    if not (x[mask] == 0).any():
        assert torch.equal(again, mask)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_nan(backend: str) -> None:
    """It is refused before the buffer is written, wherever it is and whatever is kept."""
    for at, k, sizes in ((4999, 0, None), (0, 5000, None), (4999, [3, 1], [4000, 1000]), (7, [0, 0], [4000, 1000])):
        x = torch.randn(5000, device=DEVICE)
        x[at] = -float("nan")
        before = x.clone()
        with pytest.raises(ValueError, match="x: holds a NaN"):
            topk.topk_zero_(x, k, sizes, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(x.view(torch.int32), before.view(torch.int32))


X = torch.zeros(8)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: topk.topk_mask(X.int(), 1), "x: torch.int32; wanted float32"),
        (lambda: topk.topk_mask(X.double().to(DEVICE), 1, backend="triton"), "x: torch.float64; wanted float32"),
        (lambda: topk.topk_mask(X.view(2, 2, 2), 1), r"x: shape \(2, 2, 2\); wanted \[n\]"),
        (lambda: topk.topk_mask(X[:0], 0), r"x: shape \(0,\); wanted"),
        (lambda: topk.topk_mask(X.view(2, 4).T, 1), "x: not contiguous"),
        (lambda: topk.topk_mask(X, 9), "k: 9; wanted 0 to 8"),
        (lambda: topk.topk_mask(X, -1), "k: -1; wanted 0 to 8"),
        (lambda: topk.topk_mask(X, [1]), "k: list; wanted one integer"),
        (lambda: topk.topk_mask(X, 1, [8]), "k: int; wanted one integer, or with sizes"),
        (lambda: topk.topk_mask(X, [1, 4], [5, 3]), "k: 4; wanted 0 to 3"),
        (lambda: topk.topk_mask(X, [1], [5, 3]), "k: 1 numbers; wanted 2"),
        (lambda: topk.topk_mask(X, [1, 1], [5, 4]), "sizes: 2 that add up to 9; wanted sizes >= 1 that add up to 8"),
        (lambda: topk.topk_mask(X, [1, 0], [8, 0]), "sizes: 2 that add up to 8; wanted sizes >= 1"),
    ],
)
def test_bad_input(call, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        call()


def test_no_clients() -> None:
    kept = topk.topk_mask(torch.zeros(0, 40, device=DEVICE), 3)
    assert kept.words.shape == (0, 2) and kept.threshold.shape == (0,)
