"""The fused step of a phase: what `direction` and the optimizer come to, to the bit."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import IID, SKEWED, Game, equal, make_run
from torch import Tensor

from fedpipe import io
from fedpipe.config import Local
from fedpipe.context import Ctx
from fedpipe.errors import FedpipeError
from fedpipe.loop import fused
from fedpipe.loop.capture import Programs
from fedpipe.loop.client import Client, Loop
from fedpipe.loop.lower import Sgd
from fedpipe.memory import Parts
from fedpipe.models.build import load as load_model
from fedpipe.models.chain import Chain
from fedpipe.plans import SCHEMA, key, plan_rows, read_plans
from fedpipe.seeding import seeded
from fedpipe.types import Batch, Method, Phase, Plan, Step, Tensors, under

MU = 0.3


def optimizer(momentum: float, decay: float, name: str = "sgd") -> dict[str, Any]:
    spec = {"name": name, "lr": 0.1, "momentum": momentum, "weight_decay": decay}
    return {"epochs": 2, "batch": 16, "optimizer": spec}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments by name of every call of the kernel."""
    seen: list[dict[str, Any]] = []

    def counted(*args: Any, **keywords: Any) -> Tensor:
        seen.append(keywords)
        return kernel(*args, **keywords)

    kernel = fused.step_
    monkeypatch.setattr(fused, "step_", counted)
    return seen


# ------------------------------------------------------------------------------------ methods, written with direction
def fedprox(grad: Callable[[], Tensors], at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensors, Tensors]:
    return {n: g + ctx.h["mu"] * (at[n] - at[f"in/{n}"]) for n, g in grad().items()}, {}


def scaffold(grad: Callable[[], Tensors], at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensors, Tensors]:
    return {n: g - at[f"tmp/h/{n[6:]}"] for n, g in grad().items()}, {}


def without_step(plan: Plan) -> Plan:
    assert all(p.step for p in plan.phases)
    return replace(plan, phases=tuple(replace(p, step=None) for p in plan.phases))


@pytest.mark.parametrize("decay", [0.0, 5e-4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("stack", [1, 8])
@pytest.mark.parametrize(("spec", "direction"), [({"fedprox": {"mu": MU}}, fedprox), ("scaffold", scaffold)],
                         ids=["fedprox", "scaffold"])  # fmt: skip
def test_a_method_with_direction_is_slower_not_different(
    spec: Any, direction: Callable[..., Any], stack: int, momentum: float, decay: float, root: Path, calls: list[Any]
) -> None:
    run = make_run(spec, SKEWED, stack=stack, rounds=2, local=optimizer(momentum, decay))
    slow, fast = Game(run, root), Game(run, root)
    slow.opened.rt.method = replace(slow.opened.rt.method, direction=direction)
    slow.opened.rounds.plans = {n: without_step(p) for n, p in slow.opened.plans.items()}
    calls.clear()  # of the traces that made the plans
    slow.play()
    assert not calls
    fast.play()
    groups: dict[tuple[int, int], list[int]] = {}
    for s in fast.sent:
        groups.setdefault((s.row["round"], s.row["group"]), []).append(s.metrics[0]["steps"])
    tensors = len(under(fast.state, "model/"))
    assert len(calls) == tensors * sum(max(steps) for steps in groups.values()), "one call per tensor and step"
    assert fast.largest_group == 1 if stack == 1 else any(len(set(steps)) > 1 for steps in groups.values())
    assert equal(slow.state, fast.state) and io.content_of(slow.state) == io.content_of(fast.state)
    assert slow.world.owns.keys() == fast.world.owns.keys()
    assert all(equal(slow.world.own(c), fast.world.own(c)) for c in fast.world.owns)


# -------------------------------------------------------------------------------------------------- one loop by hand
SHAPE = (1, 4, 4)


def chain() -> Chain:
    with seeded(0):
        return load_model(make_run("fedavg").model, SHAPE, 3)


def begin(at: Tensors, ctx: Ctx) -> Tensors:
    """Weights, not biases, have masks: under `mask/model/` in even, under `mask/` in odd units."""
    model = under(at, "in/model/", "model/")
    gen = torch.Generator().manual_seed(7 + (ctx.client or 0))
    weights = [n for n in model if n.endswith("weight")]
    names = [f"mask/{n if i % 2 else n[6:]}" for i, n in enumerate(weights)]
    masks = {m: torch.rand(model[n].shape, generator=gen) < 0.5 for m, n in zip(names, weights, strict=True)}
    return {**model, **masks, **{f"own/h/{n[6:]}": torch.full_like(t, 0.01) for n, t in model.items()}}


def people(count: int, at: Tensors, steps: list[int]) -> list[Client]:
    """Clients of as many steps as told, the data of a step drawn from its number and the client's."""

    def data(i: int, step: int, size: int) -> Batch:
        gen = torch.Generator().manual_seed(100 * i + step)
        x = torch.randn(size, *SHAPE, generator=gen)
        return {"x": x, "y": torch.arange(size) % 3, "w": torch.full((size,), 1 / size)}

    return [
        Client(
            ctx=Ctx(h={"mu": MU}, seed=0, clients=count, classes=3, client=i, lr=0.1),
            at=at,
            batches=lambda phase, index, i=i: [range(10 * k + i, 10 * k + i + 4) for k in range(steps[i])],  # type: ignore[misc]
            load=lambda rows, size, i=i: data(i, rows.start // 10, size),  # type: ignore[misc]
            noise=lambda index, step: None,  # type: ignore[arg-type, return-value]
        )
        for i in range(count)
    ]


def state() -> Tensors:
    return {f"in/model/{n}": t.detach().clone() for n, t in chain().named_parameters()}


def local(momentum: float = 0.9, decay: float = 0.01, name: str = "sgd") -> Local:
    return Local.model_validate(optimizer(momentum, decay, name))


FULL = Step(mask="mask/*", variate="own/h/*", anchor="in/model/*", mu=MU)
HOLD = ("in/model/*",)


def by_hand(grad: Callable[[], Tensors], at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensors, Tensors]:
    return {n: g - at[f"own/h/{n[6:]}"] + MU * (at[n] - at[f"in/{n}"]) for n, g in grad().items()}, {}


def project_each_move(masks: list[Tensor | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD's move of each leaf followed by its mask; the leaves of a step come in their order. No step is captured."""
    plain, turn = Sgd.move, cycle(masks)

    def move(self: Sgd, leaf: Tensor, *rest: Any) -> None:
        plain(self, leaf, *rest)
        if (mask := next(turn)) is not None:
            leaf.mul_(mask)

    monkeypatch.setattr(Sgd, "move", move)
    monkeypatch.setattr(Programs, "find", lambda *what: None)


def project_after_each_step(masks: list[Tensor | None], monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """An optimizer's step followed by the masks of its parameters, in their order."""
    plain = kind.step

    def step(self: Any, closure: None = None) -> None:
        plain(self, closure)
        with torch.no_grad():
            for leaf, mask in zip(self.param_groups[0]["params"], masks, strict=True):
                if mask is not None:
                    leaf.mul_(mask)

    monkeypatch.setattr(kind, "step", step)


@pytest.mark.parametrize("steps", [[3], [3, 1, 2]], ids=["one", "stack"])
def test_a_masked_step_is_direction_then_the_mask(
    steps: list[int], monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    """Two phases, the momentum carried; the stack's clients finish at different steps."""
    phases = tuple(Phase(f"p{k}", step=FULL, carry=k == 0) for k in range(2))
    plan, method = Plan(phases, hold=HOLD), Method(name="mine", begin=begin)
    fast = Loop(method, local(), lambda plan: chain()).train(people(len(steps), state(), steps), plan)
    names = [n[3:] for n in state()]
    assert len(calls) == 2 * max(steps) * len(names)
    assert sum(c["mask"] is not None for c in calls) == len(calls) // 2, "biases have no mask"
    assert [c["first"] for c in calls] == [k < len(names) for k in range(len(calls))], "momentum goes on"

    each = [[r.at.get(f"mask/{n}", r.at.get(f"mask/{n[6:]}")) for n in names] for r in fast]
    stacked = [torch.stack(m) if m[0] is not None else None for m in zip(*each, strict=True)]  # type: ignore[arg-type]
    project_each_move(stacked if len(steps) > 1 else each[0], monkeypatch)
    by_direction = replace(method, direction=by_hand)
    slow = Loop(by_direction, local(), lambda plan: chain()).train(
        people(len(steps), state(), steps), without_step(plan)
    )
    for a, b, masks in zip(slow, fast, each, strict=True):
        assert equal(a.at, b.at) and all(torch.equal(x[2], y[2]) for x, y in zip(a.phases, b.phases, strict=True))
        assert all(bool((b.at[n][~m] == 0).all()) for n, m in zip(names, masks, strict=True) if m is not None)


def test_another_optimizer_takes_the_same_direction_and_mask(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    plan, method = Plan((Phase(step=FULL),), hold=HOLD), Method(name="mine", begin=begin)
    adam = local(momentum=0.0, name="adam")
    (given,) = Loop(method, adam, lambda plan: chain()).train(people(1, state(), [3]), plan)
    names = [n[3:] for n in state()]
    masks = [given.at.get(f"mask/{n}", given.at.get(f"mask/{n[6:]}")) for n in names]
    project_after_each_step(masks, monkeypatch, torch.optim.Adam)
    by_direction = replace(method, direction=by_hand)
    (written,) = Loop(by_direction, adam, lambda plan: chain()).train(people(1, state(), [3]), without_step(plan))
    assert equal(given.at, written.at) and not calls
    assert any(m is not None and bool((given.at[n][~m] == 0).all()) for n, m in zip(names, masks, strict=True))


def test_names_that_are_not_live_stay(calls: list[Any]) -> None:
    plan = Plan((Phase(live=("model/head.*",), step=FULL),), hold=HOLD)
    (got,) = Loop(Method(begin=begin), local(), lambda plan: chain()).train(people(1, state(), [2]), plan)
    same = {n for n, t in got.sent.items() if torch.equal(t, state()[f"in/{n}"])}
    assert same == {n for n in got.sent if not n.startswith("model/head.")} and len(calls) == 4


def test_direction_gives_g(calls: list[Any]) -> None:
    """Half the gradient as `direction`, the rest of the step from data."""

    def half(grad: Callable[[], Tensors], at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensors, Tensors]:
        return {n: 0.5 * g for n, g in grad().items()}, {}

    def both(grad: Callable[[], Tensors], at: Tensors, batch: Batch, ctx: Ctx) -> tuple[Tensors, Tensors]:
        return {n: 0.5 * g + MU * (at[n] - at[f"in/{n}"]) for n, g in grad().items()}, {}

    step = Step(anchor="in/model/*", mu=MU)
    ends = [
        Loop(Method(direction=d), local(), lambda plan: chain()).train(people(2, state(), [2, 2]), plan)
        for d, plan in ((half, Plan((Phase(step=step),), hold=HOLD)), (both, Plan(hold=HOLD)))
    ]
    assert calls and all(equal(a.sent, b.sent) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("step", "keys", "said"),
    [
        (FULL, {"hold": ()}, "method mine: phase train: step.anchor: in/model/stem.1.weight or .* is neither held"),
        (Step(variate="own/c/*"), {}, "step.variate: own/c/stem.1.weight or own/c/model/stem.1.weight is neither held"),
        (Step(mask="tmp/*"), {}, r"step.mask: no live name has a mask tmp/\*"),
        (Step(mask="own/h/*"), {}, "step.mask: own/h/stem.1.weight is torch.float32; wanted bool"),
        (Step(anchor="in/model/head.1.bias"), {}, r"in/model/head.1.bias has shape \(3,\), wanted \(16, 16\)"),
    ],
)
def test_what_a_step_needs(step: Step, keys: dict[str, Any], said: str) -> None:
    plan = Plan((Phase(step=step),), hold=keys.get("hold", HOLD))
    loop = Loop(Method(name="mine", begin=begin), local(), lambda plan: chain())
    with pytest.raises(FedpipeError, match=said):
        loop.train(people(1, state(), [1]), plan)


# -------------------------------------------------------------------------------------------------- plans and memory
def test_a_step_goes_through_the_plans_file(tmp_path: Path) -> None:
    plans = {"p0": Plan((Phase(step=FULL), Phase(), Phase(step=Step(anchor="in/*", mu=1))))}
    rows = plan_rows(plans, lambda plan: [Parts()] * len(plan.phases), (), ())
    io.write_table(tmp_path / "plans.parquet", rows, {}, SCHEMA)
    read = read_plans(io.read_table(tmp_path / "plans.parquet"))[0]
    assert read == plans and key(read["p0"]) == key(plans["p0"])


def test_a_step_by_number_is_a_step_by_float() -> None:
    assert key(Plan((Phase(step=Step(mu=1)),))) == key(Plan((Phase(step=Step(mu=1.0)),)))


MASKED = """
import torch
from fedpipe.types import Method, Phase, Plan, Step, under

def plan(ctx):
    return Plan((Phase(step=Step(mask="mask/*")),))

def begin(at, ctx):
    model = under(at, "in/model/", "model/")
    return {**model, **{f"mask/{n}": torch.ones(t.shape, dtype=torch.bool) for n, t in model.items()}}

masked = Method(plan=plan, begin=begin)
"""


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "masked"])
def test_the_peak_is_the_predicted_one(name: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MASKED)
    spec = name if name != "masked" else f"{tmp_path}/mine.py:masked"
    keys = {"model": {"name": "cnn"}, "local": optimizer(0.9, 5e-4) | {"batch": 32}, "measure": "all"}
    game = Game(make_run(spec, IID, **keys), root).play(1)
    peaks = game.opened.rounds.peaks
    assert len(peaks) == 6 and all(abs(p["predicted"] / p["measured"] - 1) < 0.02 for p in peaks), peaks[0]


def test_masks_of_ones_are_no_masks(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MASKED)
    masked, plain = Game(make_run(f"{tmp_path}/mine.py:masked"), root).play(), Game(make_run("fedavg"), root).play()
    assert equal(masked.state, plain.state)
