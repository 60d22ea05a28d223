"""The strided exit: before a link that keeps every k-th pixel, the last unit of a block computes no others."""

from typing import Any

import numpy as np
import pytest
import torch
from test_costs import runtime
from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.config import ModelSpec
from fedpipe.memory.costs import Costs
from fedpipe.memory.stretch import Again, Stretch
from fedpipe.methods import fedepth
from fedpipe.models import REGISTRY
from fedpipe.models.build import load
from fedpipe.models.chain import Chain
from fedpipe.recompute import Policy
from fedpipe.seeding import seeded
from fedpipe.types import Phase, Plan, Row

IMAGE, BATCH = (3, 16, 16), 6
SHRINKS = {"b1": 4, "b2": 4, "b3": 4, "b4": 2, "b5": 2, "b6": 2, "b7": 1, "b8": 1, "b9": 1}
PLAIN, LEVEL = Policy(), Policy(levels=(("b*", 1),))


def chain_of(name: str = "preresnet20", **settings: Any) -> Chain:
    with seeded(0):
        chain = load(ModelSpec(name=name, **settings), IMAGE, 10).double().train()
        for p in chain.parameters():  # all different: norms begin with ones and zeros
            p.data += 0.1 * torch.rand(p.shape, dtype=p.dtype)
    return chain


def images(*lead: int) -> Tensor:
    return torch.randn(*lead, BATCH, *IMAGE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def loss(chain: Chain, at: dict[str, Tensor], x: Tensor, unit: str, policy: Policy, every: int | None) -> Tensor:
    """Training loss of a block that ends with `unit`; every=1: all pixels of its output, then the link."""
    words = {"upto": unit, "policy": policy, "every": every}
    z = torch.func.functional_call(chain, at, (x,), words)
    return F.cross_entropy(z, torch.arange(BATCH) % 10)


def found(chain: Chain, unit: str, policy: Policy, every: int | None, clients: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Loss and all gradients, of a stack around vmap as the training loop takes them."""
    at = {n: t.detach().clone() for n, t in chain.state_dict().items()}
    x = images(*([clients] if clients else []))
    if clients:
        at = {n: torch.stack([t + 0.01 * i if t.is_floating_point() else t for i in range(clients)])
              for n, t in at.items()}  # fmt: skip
    leaves = {n: t.requires_grad_() for n, t in at.items() if n not in chain.buffer_names}
    rest = {n: t for n, t in at.items() if n in chain.buffer_names}

    def one(leaves: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(chain, {**leaves, **{n: t.clone() for n, t in rest.items()}}, x, unit, policy, every)

    value = torch.vmap(one)(leaves, rest, x) if clients else one(leaves, rest, x)
    grads = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
    assert sum(g is not None for g in grads) > 5
    return value.detach(), [g for g in grads if g is not None]


def same(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> None:
    assert len(a[1]) == len(b[1])
    for x, y in zip([a[0], *a[1]], [b[0], *b[1]], strict=True):
        assert (x - y).norm() <= 1e-12 * y.norm()


def declared() -> list[str]:
    """Networks with a unit that can give some pixels of its output only."""
    chains = {n: load(ModelSpec(name=n), (3, 32, 32), 10) for n in REGISTRY}
    return [n for n, c in chains.items() if any(getattr(m, "exits", False) for m in c.children())]


def test_networks_that_can_are_all_checked_here() -> None:
    assert declared() == ["preresnet20"]


@pytest.mark.parametrize("policy", [PLAIN, LEVEL, Policy(again=(("b1", "b9"),)), Policy(again=(("b3", "b3"),))])
@pytest.mark.parametrize("unit", SHRINKS)
def test_losses_and_gradients_are_those_of_the_whole_output(unit: str, policy: Policy) -> None:
    chain = chain_of()
    assert chain.every(unit) == SHRINKS[unit]
    same(found(chain, unit, policy, None), found(chain, unit, PLAIN, 1))


@pytest.mark.parametrize("norm", ["running", "group"])
@pytest.mark.parametrize("policy", [PLAIN, LEVEL])
def test_other_norms_and_widths_exit_as_well(norm: str, policy: Policy) -> None:
    chain = chain_of(norm=norm, width=0.3, scale=0.3)
    for unit in ("b1", "b4", "b6"):
        same(found(chain, unit, policy, None), found(chain, unit, PLAIN, 1))


@pytest.mark.parametrize("policy", [PLAIN, LEVEL, Policy(again=(("b2", "b4"),))])
@pytest.mark.parametrize("unit", ["b2", "b4", "b5"])
def test_stacked_clients_exit_as_well(unit: str, policy: Policy) -> None:
    chain = chain_of()
    same(found(chain, unit, policy, None, clients=3), found(chain, unit, PLAIN, 1, clients=3))


@pytest.mark.parametrize("unit", SHRINKS)
def test_pixels_that_no_link_keeps_are_not_computed(unit: str) -> None:
    chain, seen = chain_of(), dict[str, int]()
    for name in SHRINKS:
        chain.get_submodule(f"{name}.conv2").register_forward_hook(
            lambda module, given, out, name=name: seen.update({name: out[0, 0].numel()})
        )
    whole = {n: np.prod(chain.shapes[n][1:]) for n in SHRINKS}
    chain(images(), upto=unit)
    assert seen.pop(unit) == whole[unit] / SHRINKS[unit] ** 2
    assert seen == {n: whole[n] for n in seen} and len(seen) == list(SHRINKS).index(unit)  # units before it: all
    chain(images(), upto=unit, head=False)
    assert seen[unit] == whole[unit]  # what goes on to other units is whole


def test_a_result_of_few_pixels_is_not_thinned_again() -> None:
    chain = chain_of()
    whole = chain(images(), upto="b2", head=False)
    few = chain(images(), upto="b2", head=False, every=4)
    assert whole.shape[-2:] == (16, 16) and few.shape[-2:] == (4, 4)
    assert torch.allclose(chain.link(few, "b2"), chain.link(whole, "b2"), rtol=0, atol=1e-12)
    assert torch.equal(chain(whole, since="b2", upto="b2"), chain.get_submodule("head")(chain.link(whole, "b2")))


class Plain(nn.Module):
    """A unit that knows of no `every`: it is given none, and the link thins its output."""

    def __init__(self, inward: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inward, out, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def test_units_that_do_not_declare_it_run_as_before() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    chain = Chain([("stem", Plain(3, 4, 1)), ("a", Plain(4, 4, 1)), ("b", Plain(4, 8, 2)), ("head", head)], IMAGE)
    assert [chain.every(u) for u in ("stem", "a", "b")] == [1, 1, 1]
    x = images().float()
    assert torch.equal(chain(x, upto="a"), head(chain.link(chain.a(chain.stem(x)), "a")))  # type: ignore[operator]


@pytest.mark.parametrize("level", [0, 1, Again])
def test_a_block_takes_no_more_bytes_and_as_many_as_are_traced(level: int | None, monkeypatch: Any) -> None:
    rt = runtime("preresnet20", batch=32)
    costs, names = rt.chooser.costs(), rt.build().names
    pairs = [(1, 1), (2, 3), (4, 4), (3, 5), (6, 6), (5, 8)]
    peaks = []
    for first, last in pairs:
        block = names[first : last + 1]
        words: dict[str, Any] = {"again": tuple((n, n) for n in block)} if level is Again else {}
        words |= {"levels": tuple((n, 1) for n in block)} if level else {}
        (phase,) = fedepth.phases(rt.plan_ctx(Row(budget=None, samples=8)), [block])
        (traced,) = rt.predictor.peaks(Plan(phases=(Phase(live=phase.live, upto=phase.upto, **words),)))
        peaks.append(Stretch(costs, 0 if first == 1 else first, last).peak(level))
        assert abs(peaks[-1] / traced - 1) < 2e-4, (first, last)
    monkeypatch.setattr(Chain, "every", lambda self, unit: 1)
    plain = Costs(rt.build(), 32, rt.run.local.optimizer, order=rt.layout(rt.build()))
    whole = [Stretch(plain, 0 if first == 1 else first, last).peak(level) for first, last in pairs]
    assert all(a <= b for a, b in zip(peaks, whole, strict=True)) and whole[-1] == peaks[-1]
    assert any(a < b for a, b in zip(peaks, whole, strict=True))
