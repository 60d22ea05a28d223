"""Recomputation: what is saved is counted, what comes out is equal, to the bit where the arithmetic is the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Game, equal, make_run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedpipe.config import ModelSpec
from fedpipe.errors import FedpipeError
from fedpipe.io import read_table
from fedpipe.memory import Peak, traced_peak
from fedpipe.models.build import load
from fedpipe.models.chain import Chain
from fedpipe.models.norms import norm_relu
from fedpipe.models.preresnet import preresnet20
from fedpipe.models.traits import check
from fedpipe.models.vit import vit_tiny
from fedpipe.plans import read_plans
from fedpipe.recompute import Conv, Policy, again
from fedpipe.seeding import seeded

IMAGE = (3, 16, 16)
NONE = Policy()
EACH = tuple((f"b{k}", f"b{k}") for k in range(1, 10))  # one unit at a time


def chain_of(name: str, **settings: Any) -> Chain:
    with seeded(0):
        return load(ModelSpec(name=name), IMAGE, 10, **settings)


def saved(forward: Callable[[], Tensor], chain: nn.Module) -> tuple[int, Tensor]:
    """Bytes of distinct storages kept for a backward, parameters aside, and the result."""
    own = {p.untyped_storage()._cdata for p in chain.parameters()}
    seen: dict[int, tuple[Tensor, int]] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage()._cdata] = (t, t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    return sum(n for key, (_, n) in seen.items() if key not in own), out


def values(chain: Chain, clients: int = 0) -> dict[str, Tensor]:
    """Parameters and buffers, all different, of one client or a stack."""
    gen = torch.Generator().manual_seed(1)
    each = [
        {n: t + 0.1 * torch.rand(t.shape, generator=gen) if t.is_floating_point() else t.clone() for n, t in given}
        for given in [list(chain.state_dict().items())] * max(1, clients)
    ]
    return {n: torch.stack([e[n] for e in each]) for n in each[0]} if clients else each[0]


def images(clients: int = 0, batch: int = 4) -> Tensor:
    lead = (clients,) if clients else ()
    return torch.randn(*lead, batch, *IMAGE, generator=torch.Generator().manual_seed(2))


def gradients(chain: Chain, policy: Policy, way: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients by name in one of the three ways the loop takes them, and the buffers after one forward."""
    clients = 0 if way == "plain" else 3
    at, x = values(chain, clients), images(clients)
    live = {n: t.requires_grad_() for n, t in at.items() if n not in chain.buffer_names}
    rest = {n: t for n, t in at.items() if n in chain.buffer_names}

    def loss(live: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        copies = {n: t.clone() for n, t in rest.items()}
        z = torch.func.functional_call(chain, {**live, **copies}, (x,), {"policy": policy})
        return z.sin().square().sum(), copies

    if way == "vmap of grad":
        plain = {n: t.detach() for n, t in live.items()}
        return torch.vmap(torch.func.grad(loss, has_aux=True))(plain, rest, x)
    value, buffers = loss(live, rest, x) if way == "plain" else torch.vmap(loss)(live, rest, x)
    grads = torch.autograd.grad(value.sum(), list(live.values()))
    return dict(zip(live, grads, strict=True)), buffers


class Running(nn.Module):
    """A convolution and a batch norm with running statistics; at level 1 with the convolution behind it."""

    levels = (0, 1)

    def __init__(self, inward: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inward)
        self.conv = nn.Conv2d(inward, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor, level: int = 0, backend: Any = "auto") -> Tensor:
        if level:
            return norm_relu(self.norm, x, Conv(), (self.conv.weight,), backend)[0]
        out: Tensor = self.conv(F.relu(self.norm(x)))
        return out


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.mean((-2, -1)))
        return out


def running() -> Chain:
    with seeded(0):
        return Chain([("stem", Running(3)), ("b1", Running(4)), ("b2", Running(4)), ("head", Last())], IMAGE)


CHAINS = {
    "batch": lambda: chain_of("preresnet20"),
    "group": lambda: chain_of("preresnet20", norm="group"),
    "vit": lambda: chain_of("vit_tiny", depth=2, dim=24),
    "running": running,
}


@pytest.mark.parametrize("way", ["plain", "around vmap", "vmap of grad"])
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("batch", Policy((("b*", 1),))),
        ("group", Policy((("b*", 1),))),
        ("vit", Policy((("b*", 1),))),
        ("vit", Policy((("b*", 2), ("b1", 1)))),
        ("running", Policy((("*", 0), ("b*", 1), ("stem", 1)))),
        ("batch", Policy(again=(("stem", "b2"), ("b4", "b9")))),
        ("batch", Policy((("b*", 1),), again=(("b2", "b3"),))),
        ("vit", Policy(again=(("stem", "b2"),))),
        ("running", Policy(again=(("stem", "b2"),))),
    ],
)
def test_gradients_and_buffers_are_equal_to_the_bit(name: str, policy: Policy, way: str) -> None:
    chain = CHAINS[name]()
    check(chain, policy)
    grads, buffers = gradients(chain, NONE, way)
    again_, changed = gradients(chain, policy, way)
    assert equal(grads, again_) and all(g.abs().max() > 0 for g in grads.values())
    assert equal(buffers, changed)


def test_running_statistics_change_once() -> None:
    """torch's own checkpoint runs the forward again as it is: statistics move twice."""
    chain, x = running().train(), images()
    start = {n: b.clone() for n, b in chain.named_buffers()}

    def after(run: Callable[[], Tensor]) -> dict[str, Tensor]:
        chain.load_state_dict({**chain.state_dict(), **start})
        run().sum().backward()
        return {n: b.clone() for n, b in chain.named_buffers()}

    once = after(lambda: chain(x))
    assert int(once["b1.norm.num_batches_tracked"]) == 1 and not equal(once, start)
    assert equal(once, after(lambda: chain(x, policy=Policy((("b1", 1), ("stem", 1))))))
    assert equal(once, after(lambda: chain(x, policy=Policy(again=(("stem", "b2"),)))))
    assert not equal(once, after(lambda: checkpoint(chain, x.requires_grad_(), use_reentrant=False)))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_block_saves_two_activations_instead_of_four(norm: str) -> None:
    chain = Chain(preresnet20((3, 32, 32), 10, norm=norm), (3, 32, 32))  # type: ignore[arg-type]
    for block, channels, side in (("b2", 16, 32), ("b5", 32, 16), ("b8", 64, 8)):
        x = torch.randn(8, channels, side, side, requires_grad=True)
        unit = chain.get_submodule(block)
        counts = [saved(lambda: unit(x, level=level), chain)[0] / x.nbytes for level in (0, 1)]  # noqa: B023
        assert counts == pytest.approx([4.0, 2.0], abs=0.01)


def test_a_layer_saves_ten_or_six_activations_instead_of_sixteen() -> None:
    chain = Chain(vit_tiny((3, 32, 32), 10, depth=1), (3, 32, 32))
    x = torch.randn(8, 65, 192, requires_grad=True)
    counts = [saved(lambda: chain.b1(x, level=level), chain)[0] / x.nbytes for level in (0, 1, 2)]  # noqa: B023
    assert counts == pytest.approx([16.0, 10.0, 6.0], abs=0.05)


def test_a_range_saves_its_input() -> None:
    chain, x = chain_of("preresnet20"), images(batch=8)
    whole, _ = saved(lambda: chain(x), chain)
    kept, _ = saved(lambda: chain(x, policy=Policy(again=(("stem", "b9"),))), chain)
    head = 3 * 8 * 64 * 4 * 4 * 4  # input of its norm, output of that, output of the ReLU at most
    assert kept <= x.nbytes + head < whole / 10


def test_vit_tiny_has_the_sizes_of_the_published_one() -> None:
    """444,864 parameters a layer; patches 9,408, class token 192, positions 12,480, norm 384 for 3x32x32."""
    chain = Chain(vit_tiny((3, 32, 32), 10), (3, 32, 32))
    sizes = {n: sum(p.numel() for p in chain.get_submodule(n).parameters()) for n in chain.names}
    assert sizes == {"stem": 9_408 + 192 + 12_480, **{f"b{k}": 444_864 for k in range(1, 13)}, "head": 384 + 1_930}
    assert chain.features == (65, 192)
    for level in (1, 2):
        assert torch.equal(
            chain(torch.ones(2, 3, 32, 32)), chain(torch.ones(2, 3, 32, 32), policy=Policy((("b*", level),)))
        )


def step(chain: Chain, at: dict[str, Tensor], policy: Policy, batch: int) -> None:
    leaves = {n: t.detach().requires_grad_() for n, t in at.items()}
    for _ in range(2):
        x, y = torch.empty(batch, *chain.shape).fill_(0.1), torch.empty(batch, dtype=torch.int64).fill_(1)
        z = torch.func.functional_call(chain, leaves, (x,), {"policy": policy})
        grads = torch.autograd.grad(F.cross_entropy(z, y), list(leaves.values()))
        del grads, z


@pytest.mark.parametrize(
    ("name", "policies", "falls"),
    [
        ("preresnet20", [NONE, Policy((("b*", 1),)), Policy(again=EACH)], [0.68, 0.65]),
        ("vit_tiny", [NONE, Policy((("b*", 1),)), Policy((("b*", 2),)), Policy(again=EACH[:4])], [0.83, 0.73, 0.68]),
    ],
)  # fmt: skip
def test_peaks_fall_and_are_predicted(name: str, policies: list[Policy], falls: list[float]) -> None:
    """Allocator's peaks of a whole step, and those of the trace, which knows the levels."""
    chain = chain_of(name, **({"depth": 4} if name == "vit_tiny" else {}))
    at = {n: p.detach() for n, p in chain.named_parameters()}
    peaks = []
    for policy in policies:
        predicted = traced_peak(lambda fake: step(chain, fake, policy, 32), at)  # noqa: B023
        with Peak(at.values()) as peak:
            step(chain, at, policy, 32)
        assert predicted == pytest.approx(peak.bytes, rel=0.02)
        peaks.append(peak.bytes)
    assert all(p < peaks[0] * share for p, share in zip(peaks[1:], falls, strict=True)), peaks


def play(tmp: Path, method: Any, model: dict[str, Any], stack: int, local: dict[str, Any], **keys: Any) -> Game:
    base = {
        "name": "levels", "rounds": 2, "cohort": 4, "model": model, "stack": stack,
        "data": {"name": "digits", "rows": 96, "partition": {"kind": "iid", "clients": 4}},
        "local": {"epochs": 1, "batch": 8, "optimizer": {"lr": 0.05, "momentum": 0.9}, **local},
    }  # fmt: skip
    return Game(make_run(method, base, **keys), tmp).play()


CNN, VIT = {"name": "preresnet20", "width": 0.25}, {"name": "vit_tiny", "depth": 3, "dim": 12}


TWO_BLOCKS = """
from dataclasses import replace
from fedpipe.methods import fedepth
from fedpipe.types import Plan

def plan(ctx):
    return Plan(phases=fedepth.phases(ctx, [ctx.units[:2], ctx.units[2:]]))

method = replace(fedepth.method, plan=plan)
"""


@pytest.mark.parametrize(("method", "phases"), [("fedavg", 1), ("two_blocks", 2)])
@pytest.mark.parametrize(
    ("model", "locals_"),
    [
        (CNN, [{"levels": {"b*": 1}}, {"again": [["b1", "b3"], ["b4", "b9"]]}]),
        (VIT, [{"levels": {"b*": 1}}, {"levels": {"b*": 2}}, {"again": [["stem", "b3"]]}]),
    ],
    ids=["preresnet20", "vit_tiny"],
)
def test_whole_runs_end_in_the_same_state(
    method: str, phases: int, model: dict[str, Any], locals_: list[dict[str, Any]], tmp_path: Path
) -> None:
    """At every level, one client after another and stacked; FeDepth's by blocks that no prediction changes."""
    (tmp_path / "two_blocks.py").write_text(TWO_BLOCKS)
    method = f"{tmp_path / 'two_blocks.py'}:method" if method == "two_blocks" else method
    for stack in (1, 4):
        plain = play(tmp_path, method, model, stack, {})
        assert read_table(plain.paths.plans).num_rows == phases
        assert plain.largest_group == (4 if stack > 1 else 1)
        for local in locals_:
            assert equal(plain.state, play(tmp_path, method, model, stack, local).state)


def test_budgets_hold_more_at_a_level(tmp_path: Path) -> None:
    """FeDepth's blocks under a budget: fewer with recomputation, by predictions; plans say what they rebuild."""
    model, budget = {"name": "preresnet20"}, {"bytes": {"4MiB": 4}}
    games = [
        play(tmp_path, "fedepth", model, 1, {"batch": 16, **local}, rounds=1, budgets=budget)
        for local in ({}, {"levels": {"b*": 1}})
    ]
    tables = [read_table(g.paths.plans) for g in games]
    assert tables[1].num_rows < tables[0].num_rows
    plans, predicted = read_plans(tables[1])
    (plan,) = plans.values()
    assert all(p.levels == (("b*", 1),) and p.again == () for p in plan.phases)
    assert max(p.peak for p in predicted.values()) <= 4 * 2**20


def test_a_study_chooses_what_levels_run_by(tmp_path: Path) -> None:
    for kernels, backend in (({}, "auto"), ({"norm": "reference"}, "reference"), ("reference", "reference")):
        game = play(tmp_path, "fedavg", CNN, 1, {"levels": {"b*": 1}}, rounds=1, kernels=kernels)
        phase = game.opened.plans["p0"].phases[0]
        policy = replace(game.opened.rt.ctx(), phase=phase)._policy()
        assert policy == Policy((("b*", 1),), (), backend)  # type: ignore[arg-type]


def test_a_phase_says_its_own_levels(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from fedpipe.types import Method, Phase, Plan\n"
        "def plan(ctx):\n"
        "    first = Phase('a', levels=(('b1', 1),), again=(('b2', 'b3'),))\n"
        "    return ctx.if_fits(Plan(phases=(first, Phase('b'))))\n"
        "method = Method(plan=plan)\n"
    )
    game = play(tmp_path, f"{mine}:method", CNN, 1, {"levels": {"b2": 1}}, rounds=1)
    plans, _ = read_plans(read_table(game.paths.plans))
    (plan,) = plans.values()
    assert [(p.levels, p.again) for p in plan.phases] == [
        ((("b1", 1),), (("b2", "b3"),)),
        ((("b2", 1),), ()),
    ]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Policy((("b1", 2),)), "levels: unit b1 has no level 2; wanted one of 0, 1"),
        (Policy((("*", 1),)), "levels: unit stem has no level 1; wanted one of 0"),
        (Policy((("c*", 1),)), "levels: no unit is called c"),
        (Policy(again=(("b3", "b1"),)), "again: b3 to b1 is no range of units"),
        (Policy(again=(("b1", "head"),)), "again: b1 to head is no range of units"),
        (Policy(again=(("b1", "b3"), ("b3", "b4"))), "again: unit b3 is in two ranges"),
    ],
)
def test_what_a_model_cannot_do_is_refused(policy: Policy, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(chain_of("preresnet20"), policy)


def test_units_that_draw_are_refused(tmp_path: Path) -> None:
    noisy = Chain([("stem", nn.Flatten()), ("b1", nn.Dropout1d(0.5)), ("head", nn.Linear(768, 10))], IMAGE)
    check(noisy, Policy(again=(("stem", "stem"),)))
    with pytest.raises(ValueError, match="again: unit b1 draws random numbers by itself"):
        check(noisy, Policy(again=(("stem", "b1"),)))
    with pytest.raises(FedpipeError, match="model preresnet20: levels: unit b1 has no level 3; wanted one of 0, 1"):
        play(tmp_path, "fedavg", CNN, 1, {"levels": {"b1": 3}})
    with pytest.raises(ValueError, match="level 1: InstanceNorm2d; wanted an affine BatchNorm2d or GroupNorm"):
        norm_relu(nn.InstanceNorm2d(3, affine=True), images(), Conv(), (torch.ones(4, 3, 3, 3),), "auto")


def test_noise_is_given_and_so_is_the_same_again() -> None:
    """What a unit's noise is made of is one of its inputs."""
    noise = torch.randn(4, 8)
    w = torch.randn(8, 8, requires_grad=True)

    def noisy(x: Tensor, w: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return ((x @ w + noise).tanh(),)

    x = torch.randn(4, 8)
    plain = torch.autograd.grad(noisy(x, w, noise)[0].sum(), w)[0]
    assert torch.equal(plain, torch.autograd.grad(again(noisy, x, w, noise)[0].sum(), w)[0])
