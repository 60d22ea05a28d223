"""Messages of sparse and quantised tensors: there and back to the bit, and what is refused."""

from interpreter import DEVICE, poisoned  # noqa: F401, I001 (the interpreter is asked for first)

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe.io import decode as read
from fedpipe.io import encode as image
from fedpipe.io import header_bytes
from fedpipe.kernels import bits, sparse
from fedpipe.kernels.sparse.codec import pack_message, pack_messages, unpack_message, unpack_messages
from fedpipe.kernels.sparse.levels import dequantise, pack_levels, quantise, unpack_levels

Tensor = torch.Tensor
FORMS = ["float32", "bfloat16", *(f"q{r}" for r in range(1, 9))]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(sparse.raw(a), sparse.raw(b))


def rounded(x: Tensor, form: str) -> Tensor:
    if form == "float32":
        return x
    return x.bfloat16().float() if form == "bfloat16" else dequantise(quantise(x, int(form[1:])), int(form[1:]))


@st.composite
def tensors(draw: Callable[..., Any]) -> tuple[Tensor, Tensor | None, str]:
    shape = draw(st.lists(st.integers(0, 12), max_size=3)) if draw(st.booleans()) else [draw(st.integers(1, 3000))]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    x *= 10.0 ** draw(st.integers(-45, 38))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < draw(st.sampled_from([0, 0.01, 0.2, 1]))
    x = torch.where(keep, x.clamp(-3e38, 3e38), 0.0)
    words = bits.pack(keep.flatten(), backend="reference").to(DEVICE) if draw(st.booleans()) else None
    return x.to(DEVICE), words, draw(st.sampled_from(FORMS))


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_a_message_carries_the_rounded_tensor(drawn: tuple[Tensor, Tensor | None, str]) -> None:
    x, words, form = drawn
    parts = pack_message("model/w.x", x, words, form)
    assert all(name.split("#")[0] == "model/w.x" and t.is_contiguous() for name, t in parts.items())
    back = unpack_message(parts, "model/w.x")
    assert same(back, rounded(x, form))
    again = pack_message("model/w.x", back, words, form)
    assert same(unpack_message(again, "model/w.x"), back)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(0, 200), st.integers(-46, 38), st.booleans(), st.integers(0, 2**32))
def test_a_second_quantisation_changes_nothing(r: int, n: int, power: int, noisy: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, generator=generator) * 10.0**power).clamp(-3e38, 3e38).to(DEVICE)
    noise = torch.rand(n, generator=generator).to(DEVICE) if noisy else None
    first = quantise(x, r, noise)
    value = dequantise(first, r)
    second = quantise(value, r)
    assert same(dequantise(second, r), value) and torch.equal(second.scale, first.scale)
    assert first.levels.numel() == 0 or int(first.levels.abs().max()) <= max(1, 2 ** (r - 1) - 1)
    assert same(unpack_message(pack_message("x", value, values=f"q{r}"), "x"), value)
    if power > -30:
        assert torch.equal(second.levels, first.levels)


def test_levels_lie_close_and_noise_keeps_the_mean() -> None:
    for r in range(1, 9):
        half = 2 ** (r - 1) - 1
        levels = torch.tensor([-1, 1] * 50 + [1]) if r == 1 else torch.arange(101).fmod(2**r - 1) - half
        packed = pack_levels(levels.to(torch.int8).to(DEVICE), r)
        assert packed.numel() == -(-101 * r // 32)
        assert torch.equal(unpack_levels("levels", packed, r, 101).cpu(), levels.to(torch.int8))
        number = sum((int(w) & 0xFFFFFFFF) << 32 * i for i, w in enumerate(packed))
        codes = (levels > 0).int() if r == 1 else levels + half
        assert [number >> r * i & (2**r - 1) for i in range(101)] == codes.tolist()
    x = torch.full((20_000,), 0.3, device=DEVICE)
    x[0] = -1
    value = dequantise(quantise(x, 3, torch.rand_like(x)), 3)
    assert value[1:].unique().tolist() == pytest.approx([0, 1 / 3]) and value[0] == -1
    assert float(value[1:].mean()) == pytest.approx(0.3, abs=0.01)
    assert float(dequantise(quantise(x, 8, torch.full_like(x, 1 - 2**-24)), 8)[0]) == -1  # 127 + noise rounds to 128
    assert float((dequantise(quantise(x, 8), 8) - x).abs().max()) <= 1 / 254 + 1e-6


def some(n: int, count: int) -> Tensor:
    x = torch.zeros(n)
    x[:count] = torch.arange(1, count + 1)
    return x


@pytest.mark.parametrize(
    ("count", "masked", "values", "codec"),
    [
        (31, True, "float32", "#index"), (32, True, "float32", "#bits"), (1024, True, "float32", "#bits"),
        (31, False, "float32", "#index"), (32, False, "float32", "#bits"), (960, False, "float32", ""),
        (0, False, "float32", "#index"), (200, True, "q4", "#bits-q4"), (900, False, "q4", "#dense-q4"),
        (10, False, "q4", "#index-q4"), (1024, False, "q1", "#dense-q1"), (1000, False, "q1", "#bits-q1"),
        (990, False, "bfloat16", "#dense-bfloat16"), (100, True, "bfloat16", "#bits-bfloat16"),
    ],
)  # fmt: skip
def test_the_fewest_bytes_are_sent(count: int, masked: bool, values: str, codec: str) -> None:
    x = some(1024, count)
    parts = pack_message("w", x, bits.pack(x != 0) if masked else None, values)
    assert {name.rpartition(".")[0] or name for name in parts} == {f"w{codec}"}
    assert masked or len(image(parts, {})) <= len(image({"w": x}, {})) + 32  # of names longer than 80 B allow for
    if codec == "#index":
        assert parts["w#index.indices"].tolist() == list(range(count))


def test_small_tensors_go_plain_and_other_types_as_they_are() -> None:
    few = torch.tensor([0.0, 2.0, 0.0], device=DEVICE)
    assert pack_message("b", few, values="q4").keys() == pack_message("b", few).keys() == {"b"}
    assert pack_message("n", torch.tensor(7, device=DEVICE), values="q4") == {"n": torch.tensor(7, device=DEVICE)}
    for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float32):
        x = torch.randn(20_000, device=DEVICE).relu().mul(3).to(dtype)
        x[:3] = torch.tensor([-0.0, float("inf"), float("nan")]) if dtype.is_floating_point else 1
        parts = pack_message("x", x.view(100, 200))
        assert set(parts) == {"x#bits.mask", "x#bits.shape", "x#bits.values"}
        assert same(unpack_message(parts, "x"), x.view(100, 200))


def test_a_file_of_messages() -> None:
    x = {"model/a.weight": some(4096, 300).view(64, 64), "model/b.bias": some(4096, 9), "model/n": torch.tensor(3)}
    x |= {"model/a": torch.randn(5, 5).T, "low#rank.u": torch.randn(3)}
    words = {"model/b.bias": bits.pack(x["model/b.bias"] != 0)}
    for form in FORMS:
        parts = pack_messages(x, words, form)
        file = image(parts, {"client": 1})
        assert file == image(pack_messages(x, words, form), {"client": 1})
        back, meta = read(file)
        assert meta["client"] == 1 and set(back) == set(parts)
        tensors = unpack_messages(back)
        assert set(tensors) == set(x) and same(tensors["low#rank.u"], x["low#rank.u"])
        assert all(same(tensors[n], t if n == "model/n" else rounded(t, form)) for n, t in x.items() if "#" not in n)
        assert len(file) - header_bytes(file) == sum(t.nbytes for t in parts.values())


def changed(part: str, value: Tensor | None, values: str = "float32") -> Callable[[], object]:
    """A message of 100 entries in 1000, of which one part came otherwise, or not at all."""
    parts = pack_message("w", some(1000, 100), bits.pack(some(1000, 100) != 0), values)
    head = next(iter(parts)).rpartition(".")[0]
    parts = {**parts, f"{head}.{part}": value}
    return lambda: unpack_message({n: t for n, t in parts.items() if t is not None}, "w")


def indexed(at: list[int], n: int = 99) -> Callable[[], object]:
    parts = {"indices": torch.tensor(at, dtype=torch.int32), "shape": torch.tensor([n]), "values": torch.ones(len(at))}
    return lambda: unpack_message({f"w#index.{k}": t for k, t in parts.items()}, "w")


ZEROS, MASK = torch.zeros(32, dtype=torch.int32), bits.pack(some(1000, 100) != 0)
BAD: list[tuple[Callable[[], object], str]] = [
    (changed("values", torch.ones(99)), r"w#bits.values: shape \(99,\); wanted \(100,\)"),
    (changed("values", torch.ones(100), "bfloat16"), "w#bits-bfloat16.values: torch.float32; wanted bfloat16"),
    (changed("values", None), r"w#bits: parts \['mask', 'shape'\]; wanted \['mask', 'shape', 'values'\]"),
    (changed("levels", ZEROS), r"w#bits: parts .*'levels'.*; wanted \['mask', 'shape', 'values'\]"),
    (changed("mask", ZEROS), r"w#bits.values: shape \(100,\); wanted \(0,\)"),
    (changed("mask", ZEROS[:31]), r"w#bits.mask: shape \(31,\); wanted \(32,\)"),
    (changed("mask", ZEROS.long()), "w#bits.mask: torch.int64; wanted int32"),
    (changed("mask", MASK | (ZEROS - 1)), "w#bits.mask: bits past entry 999 are set"),
    (changed("shape", torch.tensor([10, 99])), r"w#bits.mask: shape \(32,\); wanted \(31,\)"),
    (changed("shape", torch.tensor([-10, -100])), r"w#bits.shape: \(-10, -100\); wanted sizes of at least 0"),
    (changed("scale", torch.tensor(-1.0), "q3"), "w#bits-q3.scale: -1.0; wanted at least 0"),
    (changed("scale", torch.ones(1), "q3"), r"w#bits-q3.scale: shape \(1,\); wanted \(\)"),
    (changed("levels", torch.zeros(9, dtype=torch.int32), "q3"), r"w#bits-q3.levels: shape \(9,\); wanted \(10,\)"),
    (changed("levels", ZEROS[:10] - 1, "q3"), "w#bits-q3.levels: bits past the last of 100 levels"),
    (changed("levels", ZEROS[:25] - 1, "q8"), "w#bits-q8.levels: code 255; wanted at most 254 at 8 bits"),
    (indexed([3, 2]), "w#index.indices: not ascending, or one twice"),
    (indexed([2, 2]), "w#index.indices: not ascending, or one twice"),
    (indexed([-1, 2]), "w#index.indices: -1 to 2; wanted 0 to 98"),
    (indexed([2, 99]), "w#index.indices: 2 to 99; wanted 0 to 98"),
    (indexed([2], 2**31), r"w#index.shape: 2147483648 entries; wanted fewer than 2\*\*31"),
    (lambda: unpack_message({"v": ZEROS}, "w"), r"w: came as \[\]; wanted the tensor itself or the parts of"),
    (lambda: unpack_message({"w": ZEROS, "w#bits.mask": ZEROS}, "w"), "w: came as .*; wanted the tensor itself"),
    (lambda: unpack_messages({"w#bits-q9.mask": ZEROS}), "w: came as .*q9.*; wanted the tensor itself"),
    (lambda: pack_message("w#a", ZEROS), "name: 'w#a'; wanted one without #"),
    (lambda: pack_messages({"w#bits.mask": ZEROS}), "name: 'w#bits.mask'; wanted one without #"),
    (lambda: pack_messages({"w": ZEROS}, {"v": ZEROS}), r"words: \['v'\]; wanted names of tensors, \['w'\]"),
    (lambda: pack_message("w", ZEROS, ZEROS[:2]), r"w: words: shape \(2,\); wanted \(1,\)"),
    (lambda: pack_message("w", ZEROS[:3], ZEROS[:1] - 1), "w: words: bits past entry 2 are set"),
    (lambda: pack_message("w", ZEROS, values="q9"), "values: 'q9'; wanted float32, bfloat16 or q1 to q8"),
    (lambda: pack_message("w", ZEROS.half(), values="q2"), "w: torch.float16; wanted float32 to send it as q2"),
    (lambda: quantise(ZEROS / 0, 4), "x: NaN or infinite entries; wanted finite ones"),
    (lambda: quantise(ZEROS / 1, 9), "bits: 9; wanted 1 to 8"),
    (lambda: quantise(ZEROS / 1, 4, torch.rand(3)), r"noise: shape \(3,\); wanted \(32,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "said"), BAD, ids=range(len(BAD)))
def test_bad_input(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
