"""Messages: bytes counted without them, many in one file, and what is not finite found in the mean."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import SKEWED, Game, equal, make_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpipe import aggregate, allocator, io, packed
from fedpipe.errors import Damaged, FedpipeError
from fedpipe.kernels import bits
from fedpipe.kernels.aggregate import Part, weighted_mean
from fedpipe.messages import all_finite, finite, layout, sizes
from fedpipe.rng import key, rng
from fedpipe.route import needed_states
from fedpipe.states import Needs
from fedpipe.types import Tensors, Update, Window

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.uint8,
         torch.int32, torch.float8_e4m3fn]  # fmt: skip
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
shapes = st.lists(st.integers(0, 12), max_size=3)
values = st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False), names, st.none(),
                   st.booleans(), st.lists(st.integers(), max_size=3))  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(names.filter(lambda n: n != "__metadata__"), st.tuples(shapes, st.sampled_from(TYPES)), max_size=8),
    st.dictionaries(names.filter(lambda n: n not in ("format", "content", "seal")), values, max_size=5),
)
def test_bytes_are_those_of_the_very_image(tensors: dict[str, tuple[list[int], torch.dtype]], meta: dict) -> None:
    made = {n: torch.zeros(shape).to(dtype) for n, (shape, dtype) in tensors.items()}
    image = io.encode(made, meta)
    header = io.header_bytes(image)
    assert sizes(layout(made), meta) == (len(image) - header, header)
    back, said = io.decode(image)
    assert layout(back) == tuple(sorted(layout(made))) and said.items() >= meta.items()


def test_bytes_of_clients_of_any_number_of_digits() -> None:
    made = {f"model/{i}": torch.ones(n) for i, n in enumerate((1, 10, 1000, 100_000))} | {"mask/model/0": torch.ones(1)}
    for client in (0, 9, 10, 99, 12_345, 10**9):
        for weight in (1.0, 40.0, 1e22, 0.1, 1 / 3):
            meta = {"client": client, "round": client // 3, "samples": 40, "weight": weight}
            image = io.encode(made, meta)
            assert sum(sizes(layout(made), meta)) == len(image)


def test_tensors_that_share_memory_are_sent_as_they_are() -> None:
    x = torch.arange(12.0)
    tied = {"model/a": x, "model/b": x, "model/c": x[3:9], "model/d": x.view(3, 4).T}
    image = io.encode(tied, {})
    assert equal(io.decode(image)[0], tied) and sum(sizes(layout(tied), {})) == len(image)


# ------------------------------------------------------------------------------------------------------------ files
def pack(path: Path) -> dict[str, bytes]:
    images = {str(c): io.encode({"model/a": torch.full((5, c), float(c))}, {"client": c}) for c in (1, 12, 123)}
    packed.write(path, images.items())
    return images


def test_a_packed_file_gives_back_each_image(tmp_path: Path) -> None:
    path = tmp_path / "x.pack"
    images = pack(path)
    file = packed.Packed(path)
    assert {n: bytes(file.image(n)) for n in file.images} == images
    assert io.whole(path) and io.read_meta(path)["messages"][0] == ["1", 0, len(images["1"])]
    tensors = io.decode(file.image("12"))[0]
    assert tensors["model/a"].shape == (5, 12) and (tensors["model/a"] == 12).all()
    with pytest.raises(FedpipeError, match=r"x\.pack: no message of client 7"):
        file.image("7")
    packed.write(tmp_path / "none.pack", ())
    assert not packed.Packed(tmp_path / "none.pack").images and io.whole(tmp_path / "none.pack")


def test_every_flipped_byte_of_a_packed_file_is_found_and_its_client_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pack"
    images = pack(path)
    raw, generator = path.read_bytes(), random.Random(0)
    ends = np.cumsum([len(i) for i in images.values()])
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << generator.randrange(8))]) + raw[at + 1 :])
        who = next((n for n, end in zip(images, ends, strict=True) if at < end), None)
        with pytest.raises(Damaged, match=rf"x\.pack \(client {who}\): " if who else r"x\.pack: damaged"):
            io.read_meta(path)
        assert not io.whole(path)


def test_a_packed_file_cut_short_or_longer_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.pack"
    pack(path)
    raw = path.read_bytes()
    for wrong in (*(raw[: len(raw) * k // 8] for k in range(8)), raw[:-1], raw[1:], raw + b"\0", raw[40:], raw + raw):
        path.write_bytes(wrong)
        assert not io.whole(path)
        with pytest.raises(Damaged, match=r"x\.pack"):
            packed.Packed(path).verify()


# ------------------------------------------------------------------------------------------------------------- mean
def one_by_one(state: Tensors, updates: list[Update]) -> Tensors:
    """The mean by a fold of its own for each tensor."""
    out = dict(state)
    for n, old in state.items():
        parts = []
        for u in updates if old.is_floating_point() else ():
            if n in u.tensors:
                windows = tuple((w.dim, w.start, w.stop) for w in u.index if w.name == n)
                mask = u.tensors.get(f"mask/{n}")
                words = None if mask is None else bits.pack((mask != 0).flatten())
                parts.append(Part(u.tensors[n], u.weight, words, windows))
        out[n] = weighted_mean(old, parts, backend="reference") if parts else old
    return out


def updates_of(state: Tensors, count: int, kind: str, generator: torch.Generator) -> list[Update]:
    out = []
    for c in range(count):
        sent = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for n, t in state.items()}
        index: tuple[Window, ...] = ()
        if c % 4 == 3 and kind == "missing":
            sent.pop("model/b")
        if c % 4 == 3 and kind == "window":
            index = (Window("model/a", 0, 1, 4),)
            sent["model/a"] = sent["model/a"][1:4]
        if c % 4 == 3 and kind == "mask":
            sent["mask/model/b"] = (torch.rand(state["model/b"].shape, generator=generator) < 0.5).float()
        out.append(Update(c, (40.0, 1 / 3, 7.0)[c % 3], 40, sent | {"extra/x": torch.ones(1)}, index))
    return out


@pytest.mark.parametrize("kind", ["whole", "missing", "window", "mask"])
@pytest.mark.parametrize("count", [0, 1, 3, 8, 21])
def test_folded_side_by_side_is_folded_one_by_one(count: int, kind: str) -> None:
    g = torch.Generator().manual_seed(count)
    state: Tensors = {
        "model/a": torch.randn(6, 5, generator=g), "model/b": torch.randn(33, generator=g),
        "model/c": torch.randn(9000, generator=g), "model/d": torch.randn(200, 200, generator=g),
        "model/e": torch.randn((), generator=g), "model/f": torch.randn(70, generator=g).double(),
        "model/g": torch.randn(70, generator=g).bfloat16(), "model/n": torch.tensor(3), "model/z": torch.zeros(0, 4),
    }  # fmt: skip
    updates = updates_of({n: t for n, t in state.items() if n != "model/n"}, count, kind, g)
    got, want = aggregate.mean(state, iter(updates)), one_by_one(state, updates)
    assert list(got) == list(want)
    for n in want:
        assert (got[n].dtype, got[n].shape) == (want[n].dtype, want[n].shape) and torch.equal(got[n], want[n]), n


def test_a_bad_weight_or_type_is_still_said() -> None:
    state = {"model/a": torch.ones(3)}
    for weight, tensor, said in [
        (0.0, torch.ones(3), "weight 0.0; wanted a number > 0"),
        (1.0, torch.ones(3).double(), "values: torch.float64; wanted float32"),
        (1.0, torch.ones(4), r"values: shape \(4,\); wanted \(3,\)"),
    ]:
        good = Update(0, 1.0, 1, {"model/a": torch.ones(3)})
        with pytest.raises(ValueError, match=said):
            aggregate.mean(state, [good, Update(1, weight, 1, {"model/a": tensor})])


# ----------------------------------------------------------------------------------------------------------- finite
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_finite(dtype: torch.dtype) -> None:
    big = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
    assert finite(big), "its sum overflows"
    for bad in (float("inf"), -float("inf"), float("nan")):
        for at in (0, 57, 99):
            x = torch.zeros(100, dtype=dtype)
            x[at] = bad
            x[1 + at // 2] = -bad
            assert not finite(x) and not all_finite([torch.ones(2), x])
    assert finite(torch.tensor([1, 2])) and finite(torch.zeros(0)) and all_finite([])


MINE = """
import torch
from fedpipe.loop.client import default_begin
from fedpipe.types import Method, Plan

def keeps(at, ctx):
    return {**default_begin(at, ctx), "own/rounds": at.get("own/rounds", torch.zeros(1)) + 1}

def breaks(name):
    def end(at, ctx):
        t = at["model/head.1.bias"].clone()
        if ctx.client == 2 and ctx.round == 1:
            t[3] = float("nan")
        return {name: t}, {}
    return end

folded = Method(plan=lambda ctx: Plan(keep=("own/*",)), begin=keeps, end=breaks("model/head.1.bias"))
extra = Method(plan=lambda ctx: Plan(keep=("own/*",)), begin=keeps, end=breaks("other"))
"""


@pytest.mark.parametrize("method", ["folded", "extra"])
def test_what_is_not_finite_is_found_in_the_mean(method: str, root: Path, tmp_path: Path) -> None:
    """As it is found at once where clients are trained in jobs of their own: in metrics, states, what is kept."""
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    keys = {"cohort": 6, "on_client_failure": "drop"}
    game = Game(make_run(f"{file}:{method}", SKEWED, **keys), root).play(2)
    again = Game(make_run(f"{file}:{method}", SKEWED, **keys), root)
    world = again.opened.round(1, again.opened.round(0, again.world))
    assert equal(world.states["server@2"], game.state)
    assert {c: last for c, (last, _) in world.owns.items()} == {c: last for c, (last, _) in game.world.owns.items()}
    assert world.owns[2][0] == 0
    game.opened.log(game.sent)
    order = sorted(game.opened.log_rows, key=lambda m: (m["round"], m["client"]))
    assert again.opened.log_rows == order and sum(m["failed"] for m in order) == 1
    stop = Game(make_run(f"{file}:{method}", SKEWED, cohort=6), root)
    world = stop.opened.round(0, stop.world)
    with pytest.raises(FedpipeError, match="client 2, round 1: .* is not finite after training .*: drop goes on"):
        stop.opened.round(1, world)


# ------------------------------------------------------------------------------------------------------------ around
def test_draws_are_those_of_philox_with_the_key() -> None:
    first = rng(0, 1, 2, "a")
    for seed in (0, 7):
        for t in (None, 0, 31):
            for client in (None, 5, 123_456):
                ours = rng(seed, t, client, "a/b")
                plain = np.random.Generator(np.random.Philox(key=key(seed, t, client, "a/b")))
                assert (ours.random(7) == plain.random(7)).all()
                assert (ours.permutation(50) == plain.permutation(50)).all()
                assert (ours.standard_normal(9) == plain.standard_normal(9)).all()
                assert str(ours.bit_generator.state) == str(plain.bit_generator.state)
    assert (first.random(5) == np.random.Generator(np.random.Philox(key=key(0, 1, 2, "a"))).random(5)).all()


def test_states_needed_on_are_those_of_the_whole_route() -> None:
    """A route of nodes that mix now and then, and read states of any age."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    versions = dict.fromkeys("abc", 0)
    for t in range(30):
        now = [f"{n}@{v}" for n, v in versions.items() for v in range(max(0, v - 3), v + 1)]
        train = {"kind": "train", "round": t, "reply": draw.choice([None, *now])}
        rows += [train | {"start": draw.choice(now)} for _ in range(2)]
        for n in draw.sample("abc", draw.randrange(3)):
            base = f"{n}@{versions[n]}"
            versions[n] += 1
            rows.append({"kind": "mix", "round": t, "base": base, "out": f"{n}@{versions[n]}"})
    states: dict[str, Tensors] = {f"{n}@0": {} for n in "abc"}
    needs = Needs(rows)
    for t in range(31):
        states = needs.among(states, t)
        assert set(states) == needed_states(rows, t)
        states |= {r["out"]: {} for r in rows if r["kind"] == "mix" and r["round"] == t}


def test_freed_memory_is_kept_where_the_library_can() -> None:
    assert allocator.keep_freed() in (True, False)
    x: Tensor = torch.ones(1 << 20)
    del x
