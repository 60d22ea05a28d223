"""Chains: what runs, what reaches the head, what a narrower model holds, and what a user's file may be."""

import pytest
import torch
from torch import nn

from fedpipe.config import ModelSpec
from fedpipe.errors import FedpipeError
from fedpipe.models.build import load, windows
from fedpipe.models.chain import Chain
from fedpipe.models.traits import batch_coupled, drawing, has_conv
from fedpipe.seeding import seeded

IMAGE = (3, 16, 16)


def build(name: str = "preresnet20", shape: tuple[int, int, int] = IMAGE, classes: int = 10, **extra: object) -> Chain:
    with seeded(0):
        return load(ModelSpec(name=name), shape, classes, **extra)


@pytest.mark.parametrize(("classes", "count"), [(10, 272_314), (100, 278_164)])
def test_preresnet20_has_the_published_number_of_parameters(classes: int, count: int) -> None:
    chain = build(shape=(3, 32, 32), classes=classes)
    assert sum(p.numel() for p in chain.parameters()) == count
    assert chain.names == ("stem", *(f"b{k}" for k in range(1, 10)), "head")
    assert chain.buffer_names == () and all(n.split(".")[0] in chain.names for n in chain.tensor_names)


@pytest.mark.parametrize(
    ("name", "classes", "units", "body", "head"),
    [
        ("mobilenet", 100, 13, 3_206_976, 102_500),
        ("cnn4", 10, 3, 113_088, 2_570),
        ("resnet18", 10, 8, 11_168_832, 5_130),
        ("resnet34", 10, 16, 21_276_992, 5_130),
    ],
)
def test_networks_have_the_published_sizes(name: str, classes: int, units: int, body: int, head: int) -> None:
    """MobileNet and the four-convolution network as FedBABU counts them; the ResNets with a 3x3 stem."""
    chain = build(name, shape=(3, 32, 32), classes=classes)
    assert chain.names == ("stem", *(f"b{k}" for k in range(1, units + 1)), "head")
    sizes = {u: sum(p.numel() for p in chain.get_submodule(u).parameters()) for u in chain.names}
    assert (sum(sizes.values()) - sizes["head"], sizes["head"]) == (body, head)


@pytest.mark.parametrize("name", ["mobilenet", "cnn4", "resnet18"])
def test_networks_train_narrow_cut_short_and_whole(name: str) -> None:
    full, slim = build(name), build(name, width=0.25, scale=0.25)
    held = windows(full, slim)
    assert {w.start for w in held} == {0} and all(w.stop < full.state_dict()[w.name[6:]].shape[w.dim] for w in held)
    x = torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(1))
    for chain in (full, slim):
        chain.train()
        for upto in (None, "b1"):
            chain.zero_grad()
            chain(x, upto=upto).square().sum().backward()
            assert chain.stem.get_parameter(next(n for n, _ in chain.stem.named_parameters())).grad.abs().max() > 0
    assert bool(full.buffer_names) == (name == "resnet18")


def test_preresnet20_starts_as_published_and_adds_the_rectified_input() -> None:
    chain = build()
    state = chain.state_dict()
    assert all((t == 1).all() for n, t in state.items() if "norm" in n and n.endswith("weight"))
    assert all((t == 0).all() for n, t in state.items() if n.endswith("bias"))
    block = chain.b1
    with torch.no_grad():
        block.conv2.weight.zero_()
        x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        assert torch.equal(block(x), block.norm1(x).relu())


def test_batch_statistics_serve_in_evaluation_too() -> None:
    chain, x = build(), torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(chain.train()(x), chain.eval()(x))


def test_scale_divides_the_inputs_of_norms_in_training_only() -> None:
    chain, x = build("mlp", scale=0.5), torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(1))
    plain = build("mlp")
    assert torch.equal(chain.eval()(x), plain(x))
    assert torch.equal(chain.train().stem(x), 2 * plain.stem(x))
    seen: list[torch.Tensor] = []
    net = build(scale=0.5)
    net.b1.norm1.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    stem = net.stem(x)
    net.b1(stem)
    assert torch.equal(seen[0], 2 * stem)


def test_link_keeps_every_kth_pixel_and_pads_channels_on_both_sides() -> None:
    chain = build(shape=(3, 32, 32))
    x = torch.randn(2, 16, 32, 32, generator=torch.Generator().manual_seed(1))
    y = chain.link(x, "b3")
    assert y.shape == (2, 64, 8, 8) and chain.features == (64, 8, 8)
    assert torch.equal(y[:, 24:40], x[:, :, ::4, ::4])
    assert not y[:, :24].any() and not y[:, 40:].any()
    whole = torch.randn(2, 64, 8, 8)
    assert chain.link(whole, "b9") is whole


def test_link_of_features_pads_the_odd_zero_behind() -> None:
    chain = Chain([("stem", nn.Flatten()), ("a", nn.Linear(4, 7)), ("head", nn.Identity())], (1, 2, 2))
    y = chain(torch.ones(1, 1, 2, 2), upto="stem")
    assert y.tolist() == [[0, 1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("stem", "after"),
    [
        (nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)),  # more channels than the head takes
        (nn.ZeroPad2d(1), nn.Conv2d(1, 1, 3)),  # 6x6 pixels do not divide into 4x4
        (nn.Flatten(), nn.Unflatten(1, (1, 4, 4))),  # features where the head takes maps
    ],
)
def test_an_output_that_cannot_be_linked_names_its_unit(stem: nn.Module, after: nn.Module) -> None:
    chain = Chain([("stem", stem), ("a", after), ("head", nn.Flatten())], (1, 4, 4))
    with pytest.raises(FedpipeError, match="^unit stem: its output .* cannot be linked"):
        chain(torch.ones(2, 1, 4, 4), upto="stem")


def test_units_after_upto_never_run() -> None:
    chain, ran = build(), []
    for name in chain.names:
        getattr(chain, name).register_forward_hook(lambda m, i, o, name=name: ran.append(name))
    chain(torch.zeros(2, *IMAGE), upto="b4")
    assert ran == ["stem", "b1", "b2", "b3", "b4", "head"]
    ran.clear()
    chain(torch.zeros(2, *IMAGE))
    assert ran == list(chain.names)
    with pytest.raises(FedpipeError, match="no unit b10; units are stem"):
        chain(torch.zeros(2, *IMAGE), upto="b10")


@pytest.mark.parametrize("name", ["preresnet20", "cnn", "mlp"])
def test_windows_are_the_first_entries_of_each_dimension(name: str) -> None:
    full, slim = build(name), build(name, width=0.3)
    held = {n: t for n, t in full.state_dict().items()}
    for w in windows(full, slim):
        assert w.start == 0 and w.name.startswith("model/")
        held[w.name[6:]] = held[w.name[6:]].narrow(w.dim, w.start, w.stop)
    assert {n: t.shape for n, t in held.items()} == {n: t.shape for n, t in slim.state_dict().items()}
    assert windows(full, full) == ()
    with pytest.raises(FedpipeError, match="is no part of"):
        windows(slim, full)
    with pytest.raises(FedpipeError, match="only one of"):
        windows(full, build("mlp" if name != "mlp" else "cnn"))


def test_width_keeps_the_ceiling_of_channels_and_all_classes() -> None:
    chain = build(width=0.165)
    assert chain.b1.conv1.weight.shape[0] == 3 and chain.b9.conv2.weight.shape[0] == 11
    assert chain.head.linear.weight.shape == (10, 11)
    assert build(width=0.25).stem.conv.weight.shape[0] == 4


def test_building_leaves_the_global_generator_and_repeats_itself() -> None:
    before = torch.get_rng_state()
    one, two = build(), build()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    load(ModelSpec(name="cnn"), IMAGE, 10)
    assert not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)


def test_what_a_chain_is_made_of() -> None:
    chain = build()
    before, weights = torch.get_rng_state(), {n: t.clone() for n, t in chain.state_dict().items()}
    assert batch_coupled(chain) and has_conv(chain) and not drawing(chain)
    assert not batch_coupled(build(norm="group")) and not has_conv(build("mlp"))

    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x) if self.training else x

    for unit, yes in [(nn.Dropout(0.5), False), (nn.Dropout1d(0.5), True), (nn.Dropout(0.0), False), (Noise(), True)]:
        noisy = Chain([("stem", nn.Flatten()), ("a", unit), ("head", nn.LazyLinear(2))], (1, 2, 2))
        noisy(torch.zeros(2, 1, 2, 2))
        assert bool(drawing(noisy)) is yes
    torch.set_rng_state(before)
    assert all(torch.equal(t, weights[n]) for n, t in chain.state_dict().items())


FILE = """
from dataclasses import dataclass
from torch import nn

@dataclass
class Size:
    n: int = 5

def net(shape, classes, hidden=4):
    n = shape[0] * shape[1] * shape[2]
    return [("stem", nn.Sequential(nn.Flatten(), nn.Linear(n, hidden))), ("head", nn.Linear(hidden, classes))]

def wrong(shape, classes):
    return nn.Linear(1, 1)

def odd(shape, classes):
    return [("stem", nn.Flatten()), ("stem", nn.Flatten()), ("head", nn.Linear(2, classes))]

def broken(shape, classes):
    return [("stem", nn.Flatten()), ("a", nn.Linear(2, 2)), ("head", nn.Linear(2, classes))]

def bare():
    return []
"""


def test_a_users_file_is_a_model(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    with seeded(0):
        chain = load(ModelSpec(name="./mine.py:net", hidden=7), (1, 4, 4), 3)
    assert chain.names == ("stem", "head") and chain(torch.zeros(2, 1, 4, 4)).shape == (2, 3)
    assert chain.features == (7,)


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        (
            "preresnet99",
            {},
            "model preresnet99: unknown; known are cnn, cnn4, linear, mlp, mobilenet, .*, or",
        ),
        ("./absent.py:net", {}, "no file absent.py"),
        ("./mine.py", {}, "no file"),
        ("./mine.py:nett", {}, "mine.py: no function 'nett'; the file has .*net, wrong, odd, broken, bare"),
        ("./bad.py:net", {}, "bad.py: could not be imported .SyntaxError"),
        ("./mine.py:net", {"width": 0.5}, "model ./mine.py:net takes no width; it takes hidden"),
        ("./mine.py:bare", {}, "model ./mine.py:bare: too many positional arguments"),
        ("./mine.py:wrong", {}, "wanted .*unit name, module.* or a Chain, got Linear"),
        ("./mine.py:odd", {}, "unit name 'stem': wanted distinct names"),
        ("./mine.py:broken", {}, "unit a does not take the output before it"),
        ("preresnet20", {"width": 1.5}, "width: 1.5 is not in"),
        ("preresnet20", {"norm": "none"}, "norm: 'none'; wanted batch, running or group"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, name: str, extra: dict, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "bad.py").write_text("def net(:")
    before = torch.get_rng_state()
    with pytest.raises(FedpipeError, match=message) as found:
        load(ModelSpec(name=name), (1, 4, 4), 3, **extra)
    assert "\n" not in str(found.value)
    torch.set_rng_state(before)


def test_images_that_cannot_be_halved_twice_are_refused() -> None:
    with pytest.raises(FedpipeError, match="must be divisible by 4"):
        build(shape=(1, 18, 16))


def test_a_chain_is_vmapped_over_clients() -> None:
    chain = build("cnn", (1, 8, 8))
    params = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in chain.named_parameters()}
    x = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def one(p: dict, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(chain, p, (x,), {"upto": "stem"})

    both = torch.func.vmap(one)(params, x)
    each = torch.stack([one({n: t[i] for n, t in params.items()}, x[i]) for i in range(2)])
    torch.testing.assert_close(both, each)
