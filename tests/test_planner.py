"""Planners: the published blocks, and every answer against trying all plans, or against another solver."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import planning as oracle
from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.config import ModelSpec
from fedpipe.memory import Peak, planner
from fedpipe.memory.planner import Option
from fedpipe.memory.proxy import values
from fedpipe.models.build import load
from fedpipe.models.chain import Chain
from fedpipe.seeding import seeded

# values per sample of B1 .. B9, and of everything, stem and head included (arXiv 2303.04887, its published code)
BLOCKS = [65536] * 3 + [49152] + [32768] * 2 + [24576] + [16384] * 2
ALL = 405_504
SIX = [(1,), (2,), (3,), (4,), (5, 6), (7, 8, 9)]
THREE = [(1, 2), (3, 4), (5, 6, 7, 8, 9)]
TWO = [(1, 2, 3), (4, 5, 6, 7, 8, 9)]
LACK = [(4,), (5,), (6,), (7, 8), (9,)]

tried = settings(max_examples=120, deadline=None, derandomize=True)


def chain_of(name: str, **extra: Any) -> Chain:
    with seeded(0):
        return load(ModelSpec(name=name), (3, 32, 32), 10, **extra)


def numbered(costs: list[int], budget: float) -> tuple[list[tuple[int, ...]], list[int]]:
    """Greedy's blocks and unfit units, the first being 1."""
    blocks, unfit = planner.greedy(costs, budget)
    return [tuple(k + 1 for k in block) for block in blocks], [k + 1 for k in unfit]


# values of convolutions and norms


@pytest.mark.parametrize("norm", ["batch", "running", "group"])
def test_values_of_preresnet_are_the_published_ones(norm: str) -> None:
    found = values(chain_of("preresnet20", norm=norm))
    assert list(found) == ["stem", *(f"b{k}" for k in range(1, 10)), "head"]
    assert list(found.values()) == [32768, *BLOCKS, 4096]
    assert sum(found.values()) == ALL


def test_values_of_a_vit_count_norms_that_are_called_as_functions() -> None:
    found = values(chain_of("vit_tiny"))
    assert found["stem"] == 64 * 192 and found["head"] == 192
    assert {found[f"b{k}"] for k in range(1, 13)} == {2 * 65 * 192}


class Standardised(nn.Conv2d):
    """Its weight is normalised first, by a call that is no norm of activations."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
        return self._conv_forward(x, weight.reshape(self.weight.shape), self.bias)


class Own(nn.LayerNorm):
    """A norm that no function of torch computes."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.ones(2, 5, 3, 3))
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.conv2d(x, self.filters, padding=1), 0.5)
        return self.norm(x) if x.sum() > 0 else x


def test_values_of_a_users_chain_and_the_chain_stays_as_it_is() -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(2 * 8 * 8, 7), nn.BatchNorm1d(7), Own(7), nn.Linear(7, 3))
    up = nn.Sequential(nn.ConvTranspose2d(2, 2, 2, 2), nn.MaxPool2d(2), nn.Identity())
    chain = Chain([("a", Standardised(3, 5, 3, padding=1)), ("b", Odd()), ("c", up), ("d", head)], (3, 8, 8))
    chain.c.eval()
    state = {n: t.clone() for n, t in chain.state_dict().items()}
    modes, drawn = [m.training for m in chain.modules()], torch.get_rng_state()
    with Peak() as peak:
        found = values(chain)
    assert found == {"a": 5 * 64, "b": 2 * 2 * 64, "c": 2 * 256, "d": 7 + 7}
    assert peak.bytes < 100  # numbers that operations take
    assert all(torch.equal(t, state[n]) for n, t in chain.state_dict().items())
    assert modes == [m.training for m in chain.modules()] and torch.equal(drawn, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in chain.modules())
    assert not nn.modules.module._global_forward_hooks


# FeDepth's greedy blocks


@pytest.mark.parametrize(
    ("share", "blocks", "unfit"),
    [(1 / 6, SIX, []), (1 / 3, THREE, []), (1 / 2, TWO, []), (1, [tuple(range(1, 10))], []), (1 / 8, LACK, [1, 2, 3])],
)
def test_greedy_gives_the_published_blocks_of_preresnet(share: float, blocks: Any, unfit: Any) -> None:
    assert numbered(BLOCKS, share * ALL) == (blocks, unfit)


@pytest.mark.parametrize(("share", "size"), [(1 / 6, 2), (1 / 3, 4), (1 / 2, 6), (1, 12)])
def test_greedy_gives_the_published_blocks_of_vit_tiny(share: float, size: int) -> None:
    found = values(chain_of("vit_tiny"))
    layers = [n for unit, n in found.items() if unit not in ("stem", "head")]
    blocks, unfit = planner.greedy(layers, share * sum(found.values()))
    assert blocks == [tuple(range(k, k + size)) for k in range(0, 12, size)] and not unfit


@pytest.mark.parametrize(
    ("blocks", "low", "high", "least", "beyond"),
    [
        (SIX, 0.162, 0.202, 65536, 49152 + 32768),
        (THREE, 0.324, 0.363, 2 * 65536, 49152 + 3 * 32768),
        (TWO, 0.485, 0.606, 3 * 65536, 3 * 65536 + 49152),
        (LACK, 0.122, 0.141, 49152, 32768 + 24576),
    ],
)
def test_shares_that_give_the_published_blocks(blocks: Any, low: float, high: float, least: int, beyond: int) -> None:
    for budget in (low * ALL, high * ALL, least, beyond - 1, (least + beyond) / 2):
        assert numbered(BLOCKS, budget)[0] == blocks
    for budget in (least - 1, beyond):
        assert numbered(BLOCKS, budget)[0] != blocks
    assert math.ceil(least / ALL * 1000) / 1000 == low and math.floor(beyond / ALL * 1000) / 1000 == high


def test_the_blocks_own_sum_as_the_whole_gives_other_blocks() -> None:
    assert numbered(BLOCKS, sum(BLOCKS) / 6)[0] != SIX


def test_units_left_out_do_not_end_a_block() -> None:
    assert planner.greedy([2, 9, 3, 1, 9], 5) == ([(0, 2), (3,)], [1, 4])
    assert planner.greedy([3, 4], 2) == ([], [0, 1])
    assert planner.greedy([Fraction(1, 3)] * 3, 1) == ([(0, 1, 2)], [])  # type: ignore[list-item]


@tried
@given(st.lists(st.integers(0, 20), min_size=1, max_size=10), st.integers(0, 40))
def test_greedy_covers_what_fits_in_order_within_the_budget_in_the_fewest_blocks(costs: list[int], budget: int) -> None:
    blocks, unfit = planner.greedy(costs, budget)
    assert unfit == [k for k, c in enumerate(costs) if c > budget]
    fit = [k for block in blocks for k in block]
    assert fit == [k for k, c in enumerate(costs) if c <= budget]
    assert all(block and sum(costs[k] for k in block) <= budget for block in blocks)
    fewer = [cut for cut in oracle.cuts(len(fit)) if len(cut) < len(blocks)]
    assert not any(all(sum(costs[k] for k in fit[a : b + 1]) <= budget for a, b in cut) for cut in fewer)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet", "cnn", "preresnet20"])
def test_greedy_is_the_exact_answer_for_sums_of_other_networks_and_budgets(name: str) -> None:
    costs = list(values(chain_of(name)).values())
    for share in (0.17, 0.22, 0.29, 0.41, 0.55, 0.7, 0.93, 1.0):
        budget = max(max(costs), share * sum(costs))
        blocks, unfit = planner.greedy(costs, budget)
        exact = planner.fewest(lambda a, b: sum(costs[a : b + 1]) <= budget, len(costs))  # noqa: B023
        assert [(block[0], block[-1]) for block in blocks] == exact and not unfit


# the fewest ranges


class Asked:
    """`fits` by a set of what fits, and all it was asked."""

    def __init__(self, good: Any) -> None:
        self.good, self.calls = good, list[Any]()

    def __call__(self, *what: Any) -> bool:
        self.calls.append(what)
        return what in self.good


@st.composite
def anything_fits(draw: st.DrawFn) -> tuple[int, set[tuple[int, int]]]:
    count = draw(st.integers(1, 8))
    ranges = [(a, b) for a in range(count) for b in range(a, count)]
    chosen = draw(st.lists(st.booleans(), min_size=len(ranges), max_size=len(ranges)))
    return count, {r for r, fits in zip(ranges, chosen, strict=True) if fits}


@tried
@given(anything_fits())
def test_fewest_is_the_best_of_all_cuts_whatever_fits(given: tuple[int, set[tuple[int, int]]]) -> None:
    count, good = given
    asked = Asked(good)
    assert planner.fewest(asked, count) == oracle.fewest(lambda a, b: (a, b) in good, count)
    assert len(set(asked.calls)) == len(asked.calls) <= count * (count + 1) // 2
    assert all(0 <= a <= b < count for a, b in asked.calls)


def test_fewest_asks_once_when_everything_fits_and_prefers_long_first_ranges() -> None:
    asked = Asked({(a, b) for a in range(9) for b in range(9)})
    assert planner.fewest(asked, 9) == [(0, 8)] and asked.calls == [(0, 8)]
    assert planner.fewest(lambda a, b: b - a < 3, 5) == [(0, 2), (3, 4)]
    assert planner.fewest(lambda a, b: (a, b) in {(0, 0), (1, 3), (0, 2)}, 4) == [(0, 0), (1, 3)]
    assert planner.fewest(lambda a, b: b > a, 1) is None


# what runs again


def plain(unit: int, **keys: Any) -> Option:
    zero: dict[str, Any] = dict(saved=0, input=False, output=False, forward=0, backward=0, gradients=0, cost=0)
    return Option(unit, keys.pop("last", unit), keys.pop("level", 0), **{**zero, **keys})


def test_a_peak_is_that_counted_by_hand() -> None:
    row = [
        plain(0, saved=10, output=True, forward=15, backward=18, gradients=3),
        plain(1, last=2, level=None, input=True, forward=40, backward=60, gradients=5, cost=9),
        plain(3, saved=7, input=True, forward=20, backward=11, gradients=2),
    ]
    boundary = [0, 100, 1000, 200]
    # below 0: 0, below 1: 10 + 100, below 3: 10 + 100 + 200
    moments = [0 + 15, 10 + 40, 110 + 20, 310 + 11, 110 + 2 + 60, 0 + 5 + 2 + 18]
    assert planner.peak(row, boundary) == oracle.peak(row, boundary) == max(moments) == 321
    assert planner.peak(row[:2], boundary[:3]) == 110 + 60
    # without the output before it, an input that is not kept is not there
    row = [replace(row[0], output=False), plain(1, last=2, level=None, backward=60), plain(3, backward=1, gradients=2)]
    assert planner.peak(row, boundary) == 10 + 2 + 60


Instance = tuple[list[Option], list[int]]


def instance(number: Callable[[int], int], units: int, levels: int, ranges: int) -> Instance:
    """A chain with numbers 0..most drawn by `number(most)`: units at levels, ranges that run again; many costs tie."""
    boundary = [number(1) * number(9), *(number(9) for _ in range(units - 1))]
    gradients = [number(5) for _ in range(units)]

    def option(first: int, last: int, level: int | None) -> Option:
        saved, backward = number(12), number(30)  # of a backward that takes less than it finds, too
        return Option(
            first, last, level, saved, number(1) == 1, number(1) == 1, number(30), backward,
            sum(gradients[first : last + 1]), number(4) if level != 0 else 0,
        )  # fmt: skip

    options = [option(u, u, level) for u in range(units) for level in range(1 + number(levels - 1))]
    for _ in range(number(ranges)):
        first = number(units - 1)
        options.append(option(first, first + number(units - 1 - first), None))
    return options, boundary


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    def number(most: int) -> int:
        return draw(st.integers(0, most))

    return instance(number, 1 + number(5), 3, 6)


def check(options: list[Option], boundary: list[int], budget: int) -> None:
    best = oracle.cheapest(options, boundary, budget)
    found = planner.cheapest(options, boundary, budget)
    assert (found is None) == (best is None)
    if found is not None:
        assert (sum(o.cost for o in found), planner.peak(found, boundary)) == best
        assert planner.peak(found, boundary) == oracle.peak(found, boundary) <= budget


@tried
@given(instances(), st.integers(0, 120))
def test_cheapest_is_the_best_of_all_coverings(given: Instance, budget: int) -> None:
    check(*given, budget)


@tried
@given(instances())
def test_smallest_is_the_least_peak_of_all_coverings_and_no_less_is_feasible(given: Instance) -> None:
    least = planner.smallest(*given)
    assert least == oracle.smallest(*given)
    assert planner.cheapest(*given, least) is not None
    assert least == 0 or planner.cheapest(*given, least - 1) is None


@pytest.mark.parametrize("seed", range(6))
def test_cheapest_of_twelve_units_is_the_best_of_all_coverings(seed: int) -> None:
    random = Random(seed)
    given = instance(lambda most: random.randint(0, most), 12, 2, 12)
    least = planner.smallest(*given)
    assert least == oracle.smallest(*given)
    for budget in (least, least + 10, least + 30):
        check(*given, budget)


def test_of_equal_costs_and_peaks_the_options_that_stand_first_are_taken() -> None:
    options = [plain(u, level=level, saved=4, backward=4, cost=1) for u in (1, 0) for level in (2, 1)]
    for row in (options, options[::-1]):
        assert planner.cheapest(row, [0, 0], 8) == [next(o for o in row if o.first == u) for u in (0, 1)]
    assert planner.cheapest(options, [0, 0], 7) is None


def test_only_ranges_may_be_given_and_what_leads_nowhere_is_passed_over() -> None:
    ranges = [plain(0, last=1, level=None, cost=3), plain(2, last=3, level=None, cost=4)]
    astray = [plain(1, last=3, level=None), plain(2, cost=0), plain(0, last=0, level=None, gradients=1)]
    assert planner.cheapest([*astray[:2], *ranges], [0] * 4, 0) == ranges
    assert planner.cheapest([*ranges, plain(3, last=3), plain(1, last=2, level=None)], [0] * 4, 0) == ranges


def deep(kind: str, units: int = 64) -> Instance:
    """A chain with three levels a unit and every range to run again, in bytes of tens of megabytes in all."""
    random = Random(kind)
    if kind == "equal":
        full, edge, work = [16 * 10**6] * units, [0] + [10**6] * (units - 1), [8.0] * units
    else:
        full = [int(2e7 * (0.93**u if kind == "narrowing" else 1) * random.uniform(0.5, 1.5)) for u in range(units)]
        edge, work = [0, *(f // 4 for f in full[:-1])], [random.uniform(0.5, 1.5) for _ in range(units)]
    options = []
    for u in range(units):
        for level, (kept, again) in enumerate([(1, 0), (0.6, 0.125), (0.375, 0.375)]):
            saved = int(kept * full[u])
            rise = full[u] + 2 * edge[u]
            options.append(Option(u, u, level, saved, True, level < 2, rise, rise, 10**5, again * work[u]))
        for v in range(u, units):
            inside = sum(full[u : v + 1]) + sum(edge[u + 1 : v + 1])
            cost = sum(work[u : v + 1])
            options.append(Option(u, v, None, 0, True, False, full[u], inside, (v - u + 1) * 10**5, cost))
    return options, edge


@pytest.mark.parametrize("kind", ["equal", "narrowing", "random"])
def test_sixty_four_units_with_all_ranges_take_less_than_a_second(kind: str) -> None:
    options, boundary = deep(kind)
    assert len(options) == 3 * 64 + 2080
    whole = planner.peak([o for o in options if o.level == 0], boundary)
    cost = math.inf
    least = planner.smallest(options, boundary)
    assert least < 0.3 * whole
    for budget in (least, whole // 3, whole // 2, whole * 9 // 10, whole):
        start = time.process_time()
        found = planner.cheapest(options, boundary, budget)
        assert time.process_time() - start < 1
        assert found is not None and planner.peak(found, boundary) <= budget
        assert (now := sum(o.cost for o in found)) < cost
        cost = now
    assert cost == 0


# against torch's integer programme


def knapsack(memory: list[int], runtimes: list[int]) -> list[Option]:
    """Units that are saved or run again, of which nothing but the sum of what is saved matters."""
    saved = [plain(u, saved=m, backward=m) for u, m in enumerate(memory)]
    return [*saved, *(plain(u, level=1, cost=r) for u, r in enumerate(runtimes))]


@pytest.mark.filterwarnings("ignore:.*PuLP 4.0:DeprecationWarning")
@pytest.mark.parametrize("seed", range(5))
def test_cheapest_costs_what_torchs_integer_programme_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed._tools import sac_ilp  # by PuLP, which Snakemake brings, and its solver CBC
    from torch.distributed._tools.sac_estimator import SACStats

    assert sac_ilp.PULP_CBC_CMD(msg=0).available()

    random = Random(seed)
    units, share = 6 + 6 * seed, (0.2, 0.35, 0.5, 0.65, 0.8)[seed]
    memory, runtimes = ([random.randint(1, 1000) for _ in range(units)] for _ in range(2))
    stats = SACStats([""] * units, [float(r) for r in runtimes], memory, [], [], [], [], False)
    found = planner.cheapest(knapsack(memory, runtimes), [0] * units, math.ceil(share * sum(memory)))
    assert found is not None
    ours = int(sum(o.cost for o in found))

    def theirs() -> int:
        kept = sac_ilp.get_optimal_checkpointing_policy_per_module(stats, share)
        return sum(r for r, keep in zip(runtimes, kept, strict=True) if not keep)

    assert ours <= theirs()  # it stops 5 % short of the most time saved
    solver = sac_ilp.PULP_CBC_CMD
    monkeypatch.setattr(sac_ilp, "PULP_CBC_CMD", lambda **given: solver(**{**given, "gapRel": 0}))
    assert ours == theirs()


# bad input


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: planner.greedy([], 1), "costs: none came; wanted one of each unit"),
        (lambda: planner.greedy([1, -2], 1), "costs: -2 came; wanted numbers >= 0"),
        (lambda: planner.greedy([1], -0.5), "budget: -0.5 came; wanted a number >= 0"),
        (lambda: planner.greedy([1], math.nan), "budget: nan came; wanted a number >= 0"),
        (lambda: planner.fewest(lambda a, b: True, 0), "count: 0 came; wanted 1 at least"),
        (lambda: plain(0, saved=-1), "units 0..0: saved -1 came; wanted a number >= 0"),
        (lambda: plain(0, cost=math.inf), "units 0..0: cost inf came; wanted a number >= 0"),
        (lambda: plain(2, last=1, level=None), "units 2..1 at level None: wanted one unit at a level, or a range with"),
        (lambda: plain(1, last=2), "units 1..2 at level 0: wanted one unit at a level, or a range with level None"),
        (lambda: planner.peak([plain(0), plain(2)], [0] * 3), "options: units 2..2 came; wanted what begins with unit"),
        (lambda: planner.peak([plain(0)], [0, 0]), "options: they cover 1 units; wanted the 2 of the boundaries"),
        (lambda: planner.peak([], []), "boundary: [] came; wanted the bytes >= 0 of each unit's input"),
        (lambda: planner.cheapest([plain(0)], [0], -1), "budget: -1 came; wanted bytes >= 0"),
        (lambda: planner.cheapest([plain(0)], [-3], 1), "boundary: [-3] came; wanted the bytes >= 0 of each unit's"),
        (lambda: planner.cheapest([], [0], 1), "options: none in a row cover units 0..0"),
        (lambda: planner.smallest([plain(0), plain(2)], [0] * 3), "options: none in a row cover units 0..2"),
        (lambda: planner.smallest([plain(0), plain(1)], [0]), "options: units 1..1 came; wanted them below 1"),
        (
            lambda: planner.cheapest([plain(0, gradients=2), plain(0, level=1, gradients=3)], [0], 1),
            "units 0..0: gradients 3 came; other options of these units have 2",
        ),
        (
            lambda: planner.smallest([plain(0), plain(1, gradients=2), plain(0, last=1, level=None)], [0, 0]),
            "units 1..1: gradients 2 came; other options of these units have 0",
        ),
    ],
)
def test_bad_input_is_a_line_that_says_what_came_and_what_was_wanted(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError) as e:
        call()
    assert str(e.value).startswith(said) and "\n" not in str(e.value)
