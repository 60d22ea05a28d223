"""The lean step: captured, moved in place, channels last, with a kept prefix; within rounding of the plain loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import IID, Game, distance, equal, make_run
from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.config import Study
from fedpipe.data.dataset import Dataset
from fedpipe.errors import FedpipeError
from fedpipe.local import run_study
from fedpipe.loop import capture
from fedpipe.loop.capture import PROGRAMS, NotCaptured, Programs, trace
from fedpipe.loop.lower import Sgd, lower
from fedpipe.loop.straight import straight
from fedpipe.memory import limit
from fedpipe.memory.keep import keeping
from fedpipe.methods.fedepth import phases
from fedpipe.runtime import Runtime
from fedpipe.types import Plan, Row

SIDE = 16


def runtime(model: Any, method: str = "fedavg", size: int = SIDE, **keys: Any) -> Runtime:
    g = np.random.default_rng(0)
    data = Dataset(
        x=torch.from_numpy(g.integers(0, 256, (100, 3, size, size), dtype=np.uint8)),
        y=torch.from_numpy(g.integers(0, 10, 100)),
        test=np.zeros(100, bool),
        shape=(3, size, size),
        classes=10,
        names=tuple("abcdefghij"),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
    )
    local = {"batch": 10, "epochs": 1, "optimizer": {"name": "sgd", "lr": 0.05}} | keys.pop("local", {})
    study = Study(name="x", methods=[method], model=model, data={"partition": {"clients": 10}}, local=local, **keys)
    return Runtime(study.runs()[0], data)


def train(
    rt: Runtime, plan: Plan | None = None, clients: tuple[int, ...] = (0,), patient: bool = False
) -> list[dict[str, Tensor]]:
    plan = plan or rt.levelled(Plan())
    rows = [torch.arange(30) + 30 * c for c in clients]
    made = [
        rt.client(rt.ctx(0, c, samples=30), rt.received(plan, rt.state0), r) for c, r in zip(clients, rows, strict=True)
    ]
    return [r.sent for r in replace(rt.loop(), patient=patient).train(made, plan)]


def plain(rt: Runtime, dtype: torch.dtype, drop: bool = False) -> dict[str, Tensor]:
    """The same client's training as any researcher would write it, on the same batches and masks; NCHW."""
    net = rt.build().double() if dtype == torch.float64 else rt.build()
    net.load_state_dict({n[6:]: t.to(dtype) for n, t in rt.state0.items()})
    net.train()
    spec = rt.run.local.optimizer
    sgd = torch.optim.SGD(net.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    client = rt.client(rt.ctx(0, 0, samples=30), {}, torch.arange(30))
    from fedpipe.models.dropout import aside

    for i, rows in enumerate(client.batches(Plan().phases[0], 0)):
        x, y = rt.data.batch(torch.from_numpy(rows), dtype)
        masks = net.noise(aside(client.noise(0, i)), len(rows), net.names) if net.noise else {}
        for n, mask in masks.items():
            net.get_submodule(n.removeprefix("tmp/noise/")).keep = mask
        sgd.zero_grad()
        F.cross_entropy(net(x), y).backward()
        sgd.step()
    return {f"model/{n}": t.detach().double().clone() for n, t in net.state_dict().items()}


def away(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[n].double() - b[n].double()).square().sum() for n in b if b[n].is_floating_point()).sqrt())


@pytest.mark.parametrize("decay", [0.0, 1e-3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("model", ["simple_cnn", "preresnet20", "linear", "cnn4", {"name": "mlp", "hidden": [700, 9]}])
def test_it_is_no_farther_from_float64_than_the_plain_loop(model: Any, momentum: float, decay: float) -> None:
    """By the norm over all parameters, and not farther than three times; run twice the bytes are the same."""
    sgd = {"local": {"optimizer": {"name": "sgd", "lr": 0.02, "momentum": momentum, "weight_decay": decay}}}
    size = 32 if model in ("linear", "simple_cnn") else SIDE
    first, again = (train(runtime(model, size=size, **sgd))[0] for _ in range(2))
    assert equal(first, again)
    exact = plain(runtime(model, size=size, precision="float64", **sgd), torch.float64)
    ours, theirs = away(first, exact), away(plain(runtime(model, size=size, **sgd), torch.float32), exact)
    assert 0 < ours <= 3 * theirs


def test_a_large_gradient_is_added_to_its_weight_without_being_made() -> None:
    rt = runtime("linear", size=32, local={"optimizer": {"name": "sgd", "lr": 0.03}}, stack=10)
    stacked = train(rt, clients=(0, 1, 2, 0, 1, 2))
    source = [p.silent.__doc__ for k, v in PROGRAMS.known.items() for p in v if p and rt.build().key in k[0]]
    assert any("baddbmm" in s for s in source) and not any("bmm_1" in s for s in source if "baddbmm" in s)
    alone = train(runtime("linear", size=32, local={"optimizer": {"name": "sgd", "lr": 0.03}}))[0]
    assert distance(stacked[0], alone) < 1e-6 and equal(stacked[0], stacked[3])


def test_a_step_that_looks_at_values_is_not_captured_and_still_right(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from fedpipe.types import Method\n"
        "def direction(grad, at, batch, ctx):\n"
        "    g = grad()\n"
        "    scale = 2.0 if float(batch['y'].sum()) % 2 else 1.0\n"
        "    return {n: scale * t for n, t in g.items()}, {}\n"
        "branching = Method(direction=direction)\n"
    )
    odd = Game(make_run(f"{tmp_path}/mine.py:branching", stack=1), root).play(1)
    assert all(p is None for k, v in PROGRAMS.known.items() if odd.opened.rt.method.direction in k[1] for p in v)
    assert distance(odd.state, Game(make_run("fedavg", stack=1), root).play(1).state) > 1e-4
    with pytest.raises(NotCaptured, match="a tensor of its own"):
        trace(lambda x: [x + torch.from_numpy(np.ones(3, np.float32))], [torch.zeros(3)])


@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize("model", ["preresnet20", "cnn", {"name": "mlp"}, {"name": "vit_tiny", "depth": 2, "dim": 48}])
def test_a_step_that_is_not_captured_has_the_same_bits(model: Any, stack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no weight is large: so the first steps of a process may run as they are."""
    sgd = {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}, "epochs": 2}
    clients = (0, 1, 2)[:stack]
    fast = train(runtime(model, local=sgd, stack=stack), clients=clients)
    monkeypatch.setattr(capture, "PATIENCE", 3)
    part = train(rt := runtime(model, local=sgd, stack=stack), clients=clients, patient=True)
    assert max(rt.programs._waits.values()) > 3
    monkeypatch.setattr(Programs, "find", lambda *what: None)
    slow = train(runtime(model, local=sgd, stack=stack), clients=clients)
    assert all(equal(a, b) and equal(a, c) for a, b, c in zip(slow, fast, part, strict=True))


def test_facts_of_the_round_that_a_step_reads_are_not_those_of_another(root: Path, tmp_path: Path) -> None:
    """A direction that reads ctx.lr, under a schedule: as if nothing were captured."""
    (tmp_path / "mine.py").write_text(
        "from fedpipe.types import Method\n"
        "def direction(grad, at, batch, ctx):\n"
        "    return {n: t * (1 + ctx.lr) for n, t in grad().items()}, {}\n"
        "scaled = Method(direction=direction)\n"
    )
    run = make_run(f"{tmp_path}/mine.py:scaled", rounds=3, local={**IID["local"], "schedule": "cosine"}, stack=1)
    fast = Game(run, root).play()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Programs, "find", lambda *what: None)
        slow = Game(run, root).play()
    assert len({p.facts["lr"] for v in PROGRAMS.known.values() for p in v if p and "lr" in p.facts}) >= 3
    assert distance(fast.state, slow.state) < 1e-6


def test_a_weight_moves_after_its_last_use_and_a_value_is_written_over_after_its() -> None:
    def step(w: Tensor, x: Tensor) -> list[Tensor]:
        leaf = w.detach().requires_grad_()
        with torch.enable_grad():
            y = (x * 3).relu() @ leaf
            value = (y * y.detach().exp()).sum() + leaf.square().sum()
            (g,) = torch.autograd.grad(value, [leaf])
        return [value.detach() + w.sum(), g]

    w, x = torch.randn(300, 500) / 100, torch.randn(7, 300)
    module = trace(step, [w, x])
    want, g = step(w, x)
    leaf = next(n for n in module.graph.nodes if n.op == "placeholder")
    lower(module.graph, Sgd(0.0, 0.0), [(leaf, None)])
    run, moved, kept = straight(module.graph), w.clone(), x.clone()
    (value,) = run(moved, kept, -0.1, 1.0)
    assert "relu_" in [getattr(n.target, "__name__", "").split(".")[0] for n in module.graph.nodes]
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(moved, w - 0.1 * g)
    assert torch.equal(kept, x), "what comes from outside is never written over"


# ------------------------------------------------------------------------------------------------------- kept prefix
def blocks(rt: Runtime, size: int) -> Plan:
    units = rt.build().names[1:-1]
    parts = [units[i : i + size] for i in range(0, len(units), size)]
    return rt.levelled(Plan(phases=phases(rt.plan_ctx(Row(None, 30)), parts)))


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize(
    "model",
    ["preresnet20", {"name": "preresnet20", "norm": "group"}, "mlp", {"name": "vit_tiny", "depth": 3, "dim": 12}],
)
def test_a_kept_prefix_is_the_prefix(model: Any, stack: int) -> None:
    """Bit for bit, and in a stack within rounding."""
    exact = stack == 1
    keys: dict[str, Any] = {"method": "fedepth", "local": {"batches": "fixed", "epochs": 2}, "stack": stack}
    keys |= {"precision": "float32" if exact else "float64"}
    clients = tuple(range(stack))
    run = train(rt := runtime(model, **keys), blocks(rt, 2), clients)
    plan = keeping(rt := runtime(model, **keys), blocks(rt, 2), Row(None, 30), 30)
    ends = [p.since for p in plan.phases]
    assert ends[0] is None and ends[1:] == [p.upto for p in plan.phases[:-1]]
    kept = train(rt, plan, clients)
    assert not exact or equal(run[0], kept[0])
    assert exact or all(distance(a, b) < 1e-9 for a, b in zip(run, kept, strict=True))


def test_a_prefix_is_kept_as_far_as_the_budget_holds_it_and_it_is_measured() -> None:
    from fedpipe.memory.enforce import Witness

    rt = runtime("preresnet20", method="fedepth", local={"batches": "fixed", "epochs": 2})
    whole = keeping(rt, blocks(rt, 1), Row(None, 30), 30)
    parts = rt.predictor.parts(whole)
    rows = torch.arange(30)
    witness = Witness({"client": 0, "round": 0, "plan": "p", "witness": True}, parts, None, rt.device, "enforce")
    client = rt.client(rt.ctx(0, 0, samples=30), rt.received(whole, rt.state0), rows)
    rt.loop(witness.phase).train([client], whole)
    for seen, part in zip(witness.rows, parts, strict=True):
        assert part.features > 0 or seen["phase"] == 0
        assert seen["measured"] <= part.peak * 1.01
    least = max(rt.predictor.peaks(blocks(rt, 1)))
    tight = keeping(rt, blocks(rt, 1), Row(int(least * 1.05) + 2, 30), 30)
    held = [p.since is not None for p in tight.phases]
    assert any(held) and sum(held) < sum(p.since is not None for p in whole.phases)
    assert all(p.peak <= least for p in rt.predictor.parts(tight))


@pytest.mark.parametrize(
    "why", ["batches drawn anew", "prefix: run", "a loss of its own", "a direction of its own", "running statistics"]
)
def test_a_prefix_that_could_differ_is_run_for_every_batch(why: str) -> None:
    local = {"batches": "redraw" if why == "batches drawn anew" else "fixed"}
    local |= {"prefix": "run"} if why == "prefix: run" else {}
    model = {"name": "preresnet20", "norm": "running"} if why == "running statistics" else "preresnet20"
    rt = runtime(model, method="fedepth", local=local)
    if why == "a direction of its own":
        rt.method = replace(rt.method, direction=lambda grad, at, batch, ctx: (grad(), {}))
    if why == "a loss of its own":
        rt.method = replace(rt.method, loss=lambda at, batch, ctx: ctx.task(ctx.apply(at, batch["x"]), batch))
    assert all(p.since is None for p in keeping(rt, blocks(rt, 3), Row(None, 30), 30).phases)


def test_fixed_batches_keep_their_members_and_change_their_order() -> None:
    rt = runtime("mlp", local={"batches": "fixed", "epochs": 3})
    client = rt.client(rt.ctx(4, 2, samples=25), {}, torch.arange(50, 75))
    phase = Plan().phases[0]
    first, second = client.batches(phase, 0), client.batches(phase, 1)
    members = {tuple(b) for b in first}
    assert len(first) == 9 and sorted(map(len, members)) == [5, 10, 10] and members == {tuple(b) for b in second}
    assert sorted(r for b in members for r in b) == list(range(50, 75))
    assert [tuple(b) for b in first] != [tuple(b) for b in second]
    other = rt.client(rt.ctx(5, 2, samples=25), {}, torch.arange(50, 75)).batches(phase, 0)
    assert members != {tuple(b) for b in other}, "another round draws other members"


# ------------------------------------------------------------------------------------------------------------ layouts
def test_a_net_that_cannot_run_channels_last_runs_as_it_is() -> None:
    class Viewing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1)

    from fedpipe.models import traits
    from fedpipe.models.chain import Chain

    def net(flat: nn.Module) -> Chain:
        return Chain([("stem", nn.Conv2d(3, 4, 3)), ("flat", flat), ("head", nn.Linear(144, 2))], (3, 8, 8))

    assert traits.channels_last(net(nn.Flatten())) and not traits.channels_last(net(Viewing()))
    last, first = torch.channels_last, torch.contiguous_format
    for rt, layout in ((runtime("cnn"), last), (runtime("cnn", stack=4), first), (runtime("mlp"), first)):
        assert rt.layout(rt.build()) is layout
    narrow = runtime("preresnet20")
    assert [narrow.layout(narrow.build((("width", w),))) for w in (0.25, 0.5)] == [first, last]


# ------------------------------------------------------------------------------------------------------------- stacks
def test_a_stack_that_does_not_fit_the_device_is_one_line_in_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limit.total(torch.device("cpu")) > 1 << 28
    study = tmp_path / "tiny.yaml"
    keys = "rounds: 1\ncohort: 6\nmodel: mlp\ndata: {partition: {clients: 6}}\n"
    study.write_text(f"name: tiny\nmethods: [fedavg]\n{keys}")
    monkeypatch.setattr(limit, "total", lambda device: 1 << 15)
    what = r"^measure: a stack of 4 clients of method fedavg needs .* MiB, this device has 0.0312 MiB; lower stack"
    with pytest.raises(FedpipeError, match=what) as raised:
        run_study(study, ["stack=4"], None, tmp_path / "out", 1, "last")
    assert "\n" not in str(raised.value) and not list(tmp_path.glob("out/**/state"))
    run_study(study, ["stack=1"], None, tmp_path / "out", 1, "last")
