"""Methods through the real step files against straight-line re-statements of their papers, in float64."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracles import draws, fedepth, heterofl, plain, scaffold
from played import CLOSE, Played, apart, as_list, local, play
from torch import Tensor, nn

from fedpipe import io, methods
from fedpipe.aggregate import cut
from fedpipe.config import Local, ModelSpec
from fedpipe.context import Ctx
from fedpipe.loop.client import Client, Loop
from fedpipe.methodspec import MethodSpec
from fedpipe.models.build import load, windows
from fedpipe.models.chain import Chain
from fedpipe.rng import rng
from fedpipe.seeding import seeded
from fedpipe.types import Method, Tensors, Update

# --------------------------------------------------------------------------------------------------- FedAvg &c.
FIVE = {"name": "digits", "rows": 200, "size": 8, "partition": {"kind": "dirichlet", "alpha": 0.5, "clients": 5}}
SIX = {**FIVE, "partition": {"kind": "dirichlet", "alpha": 0.5, "clients": 6}}
MLP = {"model": {"name": "mlp", "hidden": [12, 10]}, "rounds": 2, "cohort": 3}


def test_fedavg(root: Path) -> None:
    got = play(root, data=FIVE, methods=["fedavg"], local={**local(2), "schedule": "cosine"}, **MLP)
    w = got.mlp(0)
    for t, cohort in enumerate(got.cohorts()):
        lr = [0.05, 0.025][t]  # half a cosine over two rounds
        w = plain.mean(
            [plain.sgd(w, got.batches(t, i), lr, momentum=0.9, decay=5e-4) for i in cohort], got.samples(cohort)
        )
    assert len({len(r) for r in got.rows.values()}) > 1
    assert apart(w, got.mlp(0)) > 1e-2
    assert apart(w, got.mlp(2)) <= CLOSE


def test_fedprox(root: Path) -> None:
    mu = 0.7
    got = play(root, data=FIVE, methods=[{"fedprox": {"mu": mu}}], local=local(3, lr=0.1), **MLP)
    w = got.mlp(0)
    free = w
    for t, cohort in enumerate(got.cohorts()):
        w, free = (
            plain.mean([plain.sgd(x, got.batches(t, i), 0.1, mu=m) for i in cohort], got.samples(cohort))
            for x, m in ((w, mu), (free, 0.0))
        )
    assert apart(w, free) > 1e-3
    assert apart(w, got.mlp(2)) <= CLOSE


def test_fedbabu(root: Path) -> None:
    got = play(root, data=FIVE, methods=["fedbabu"], local=local(2), until="evaluate", **MLP)
    start, body = got.mlp(0), len(got.mlp(0)) - 2
    w = weighted = start
    for t, cohort in enumerate(got.cohorts()):
        w, weighted = (
            plain.mean(
                [plain.sgd(x, got.batches(t, i), 0.05, momentum=0.9, decay=5e-4, moving=body) for i in cohort], weights
            )
            for x, weights in ((w, [1] * len(cohort)), (weighted, got.samples(cohort)))
        )
    end = got.mlp(2)
    assert apart(end[:body], start[:body]) > 1e-2
    assert apart(w, weighted) > 1e-4, "a uniform and a weighted mean must differ here"
    assert apart(w[:body], end[:body]) <= CLOSE
    assert all(torch.equal(a, b) for a, b in zip(end[body:], start[body:], strict=True))
    _check_fine_tuning(got, w[:body] + start[body:])


def _check_fine_tuning(got: Played, w: plain.Weights) -> None:
    """Five epochs of the whole network on each client's own training rows, scored on its own test rows."""
    found = {(r["client"], r["column"]): r["loss"] for r in io.read_table(got.paths.metrics).to_pylist()}
    for client, rows in got.test_rows.items():
        order = draws.batches(0, got.run.rounds, client, got.rows[client], 16, 5, role="eval")
        tuned = plain.sgd(w, [got.batch(r) for r in order], 0.05 * 0.01, momentum=0.9, decay=5e-4)
        for column, model in (("global", w), ("personal", tuned)):
            x, y = got.batch(rows)
            assert float(plain.cross_entropy(plain.logits(model, x), y)) == pytest.approx(
                found[client, column], abs=CLOSE
            )
        assert abs(found[client, "global"] - found[client, "personal"]) > 1e-6


# ----------------------------------------------------------------------------------------------------- SCAFFOLD
@pytest.mark.parametrize("cohort", [3, 6])
def test_scaffold(root: Path, cohort: int) -> None:
    keys = {**MLP, "rounds": 3, "cohort": cohort}
    got = play(root, data=SIX, methods=["scaffold"], local=local(2, lr=0.1), **keys)
    start = got.mlp(0)
    zero = [torch.zeros_like(t) for t in start]
    x, c, ci = scaffold.rounds(
        start, zero, {i: zero for i in range(6)}, got.cohorts(), got.batches, plain.gradient, lr=0.1
    )
    assert len({len(got.batches(0, i)) for i in got.rows}) > 1, "clients must take different numbers of steps"
    assert apart(c, zero) > 1e-2
    assert apart(x, got.mlp(3)) <= CLOSE
    assert apart(c, got.mlp(3, "server/c/")) <= CLOSE
    own = {}
    for path in sorted(got.paths.own(3).glob("*.safetensors")):
        own[int(path.stem.split("@")[0])] = as_list(
            {n.removeprefix("own/c/"): t for n, t in io.read_tensors(path)[0].items()}
        )
    assert sorted(own) == sorted({i for drawn in got.cohorts() for i in drawn})
    assert max(apart(ci[i], own[i]) for i in own) <= CLOSE
    if cohort == 6:
        assert apart(plain.mean(list(own.values()), [1] * 6), got.mlp(3, "server/c/")) <= CLOSE


# --------------------------------------------------------- quadratics f_i(w) = a_i / 2 (w - c_i)^2 with known answers
A, C = (0.5, 2.0, 8.0), (1.0, -3.0, 4.0)
OPTIMUM = sum(a * c for a, c in zip(A, C, strict=True)) / sum(A)
SCALAR = Chain([("stem", nn.Flatten()), ("head", nn.Linear(1, 1, bias=False))], (1, 1, 1)).double()
W = "model/head.weight"


def scalar_rounds(method: Method, state: Tensors, rounds: int, steps: int, lr: Callable[[int], float],
                  together: bool, a: Sequence[float] = A) -> tuple[Tensors, dict[int, Tensors]]:  # fmt: skip
    """Rounds of the loop and the server's mean over all three quadratics; clients stacked, or one after another."""

    def loss(at: Tensors, batch: Tensors, ctx: Ctx) -> Tensor:
        return batch["a"] / 2 * (at[W].squeeze() - batch["c"]) ** 2

    def quadratic(i: int) -> Tensors:
        return {"a": torch.tensor(a[i]).double(), "c": torch.tensor(C[i]).double()}

    method = replace(method, loss=loss)
    assert method.plan is not None
    plan = method.plan(SimpleNamespace(h=method.h, if_fits=lambda p: p))  # type: ignore[arg-type]
    assert plan is not None
    ctx = Ctx(h=method.h, seed=0, clients=3, classes=1)
    own: dict[int, Tensors] = {i: {} for i in range(3)}
    for t in range(rounds):
        people = [
            Client(
                ctx=replace(ctx, round=t, client=i, lr=lr(i)),
                at={**{f"in/{n}": v for n, v in state.items()}, **own[i]},
                batches=lambda phase, index, i=i: [range(i, i + 1)] * steps,  # type: ignore[misc]
                load=lambda row, size: quadratic(row[0]),
                noise=lambda index: rng(0),
            )
            for i in range(3)
        ]
        loop = Loop(method, Local(), lambda plan: SCALAR)
        results = loop.train(people, plan) if together else [loop.train([p], plan)[0] for p in people]
        updates = [Update(i, 1.0, 1, r.sent, plan.index) for i, r in enumerate(results)]
        own = {i: r.own for i, r in enumerate(results)}
        state = method.aggregate(state, updates, ctx) if method.aggregate else _mean(state, updates)
    return state, own


def _mean(state: Tensors, updates: list[Update]) -> Tensors:
    return {n: torch.stack([u.tensors[n] for u in updates]).mean(0) for n in state}


def test_scaffold_reaches_the_optimum_of_quadratics() -> None:
    method = methods.load(MethodSpec(name="scaffold"))
    zero = torch.zeros(1, 1, dtype=torch.float64)
    state, own = scalar_rounds(method, {W: zero, "server/c/head.weight": zero}, 60, 10, lambda i: 0.05, together=True)
    x, c, ci = scaffold.rounds(
        [zero], [zero], {i: [zero] for i in range(3)}, [range(3)] * 60, lambda t, i: [i] * 10,
        lambda w, i: [A[i] * (w[0] - C[i])], lr=0.05,
    )  # fmt: skip
    assert pytest.approx(2.5238, abs=1e-4) == OPTIMUM
    assert abs(float(state[W]) - OPTIMUM) <= 1e-12
    assert abs(float(state[W] - x[0])) <= 1e-13
    kept = [own[i]["own/c/head.weight"] for i in range(3)]
    assert apart(kept, [ci[i][0] for i in range(3)]) <= 1e-12
    assert float(abs(sum(kept) / 3 - state["server/c/head.weight"])) <= 1e-13


@pytest.mark.parametrize(("a", "known"), [(A, 0.832), ((2.0, 2.0, 2.0), sum(C) / 3)])
def test_fedprox_stops_at_its_fixed_point_of_quadratics(a: tuple[float, ...], known: float) -> None:
    """With rate 1 / (a + mu) one step solves a client's problem; the second stays there only with the right pull."""
    mu = 0.5
    method = methods.load(MethodSpec(name="fedprox", settings={"mu": mu}))
    start = {W: torch.zeros(1, 1, dtype=torch.float64)}
    state, _ = scalar_rounds(method, start, 30, 2, lambda i: 1 / (a[i] + mu), together=False, a=a)
    pulls = [x / (x + mu) for x in a]  # w = mean (a c + mu w) / (a + mu)
    fixed = sum(p * c for p, c in zip(pulls, C, strict=True)) / sum(pulls)
    assert fixed == pytest.approx(known, abs=5e-4)
    assert float(state[W]) == pytest.approx(fixed, abs=CLOSE)


# ----------------------------------------------------------------------------------------------------- HeteroFL
WIDTHS = {0.25: 1, 0.5: 1, 1.0: 1}  # clients 0, 1, 2


def test_heterofl(root: Path) -> None:
    """Two of three clients a round; the first is without the full width, so that nobody holds the outer entries."""
    seed = next(s for s in range(100) if draws.cohort(s, 0, 3, 2) == [0, 1] and draws.cohort(s, 1, 3, 2) == [1, 2])
    data = {**FIVE, "partition": {"kind": "dirichlet", "alpha": 0.5, "clients": 3}}
    got = play(root, every=1, data=data, methods=["heterofl"], local=local(2), seeds=[seed], margin=0.2,
               budgets={"like_width": WIDTHS}, **{**MLP, "cohort": 2})  # fmt: skip
    assert len(set(got.samples(range(3)))) == 3, "a mean weighted by samples must differ here"
    w = got.mlp(0)
    for t, cohort in enumerate(got.cohorts()):
        ends = []
        for i in cohort:
            rate = list(WIDTHS)[i]
            slim = [x[tuple(slice(n) for n in size)] for x, size in zip(w, _sizes(w, rate), strict=True)]
            ends.append(plain.sgd(slim, got.batches(t, i), 0.05, momentum=0.9, decay=5e-4, rate=rate))
        old = w
        w = [torch.from_numpy(heterofl.mean(x.numpy(), [e[k].numpy() for e in ends])) for k, x in enumerate(w)]
        state = got.mlp(t + 1)
        assert apart(w, state) <= CLOSE
        assert torch.equal(state[0][6:], old[0][6:]) == (t == 0), "rows beyond width 0.5 stay while nobody holds them"
        assert apart(state, old) > 1e-2


def _sizes(w: plain.Weights, rate: float) -> list[tuple[int, ...]]:
    last = len(w) - 2
    return [heterofl.part(tuple(x.shape), rate, first=k == 0, last=k >= last) for k, x in enumerate(w)]


@pytest.mark.parametrize("rate", [0.5, 0.25])
def test_slim_preresnet_computes_with_the_first_channels(rate: float) -> None:
    with seeded(5):
        full, slim = (load(ModelSpec(), (1, 8, 8), 10, **k).double() for k in ({}, {"width": rate, "scale": rate}))
        state = {f"model/{n}": torch.randn(t.shape).double() for n, t in full.state_dict().items()}
        x = torch.randn(6, 1, 8, 8).double()
    sizes: fedepth.Sizes = (int(16 * rate), int(32 * rate), int(64 * rate))
    held = {n.removeprefix("model/"): t for n, t in cut(state, windows(full, slim)).items()}
    with torch.no_grad():
        for training in (True, False):
            net = fedepth.Net(1, 10, sizes, rate if training else 1.0)
            net.put(
                {o: state[f"model/{n}"][tuple(slice(k) for k in net.w[o].shape)] for o, n in fedepth.names().items()}
            )
            z = torch.func.functional_call(slim.train(training), held, (x,))
            assert float((z - net(x)).abs().max()) <= CLOSE * float(z.abs().max())
