"""Options of a study that every method has alike: the loss, and the statistics of batch norms at evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import IID, SKEWED, Game, distance, make_run
from torch import Tensor
from torch.nn import functional as F

from fedpipe.runtime import Runtime
from fedpipe.types import Phase, Tensors

PRE: dict[str, Any] = {"model": "preresnet20", "data": {**IID["data"], "size": 8}, "rounds": 1}


def by_hand(rt: Runtime, who: int, rows: Tensor, loss: str) -> Tensors:
    """One epoch of SGD on the engine's own batches; absent classes' logits are 0."""
    client = rt.client(rt.ctx(0, who), {}, rows)
    net, phase = rt.build(), Phase()
    net.load_state_dict({n[6:]: t.clone() for n, t in rt.state0.items()})
    sgd = torch.optim.SGD(net.train().parameters(), lr=rt.run.local.optimizer.lr)
    own = set(rt.data.y[rows].tolist())
    for batch in client.batches(phase, 0):
        x, y = rt.data.batch(torch.from_numpy(batch), rt.dtype)
        has = {"masked_batch": set(y.tolist()), "masked_client": own}[loss]
        z = net(x)
        z = torch.stack([z[:, c] if c in has else torch.zeros(len(y)) for c in range(rt.data.classes)], 1)
        sgd.zero_grad()
        F.cross_entropy(z, y).backward()
        sgd.step()
    return {f"model/{n}": t.detach().clone() for n, t in net.state_dict().items()}


@pytest.mark.parametrize("stack", [1, 6])
@pytest.mark.parametrize("loss", ["masked_batch", "masked_client"])
def test_logits_of_absent_classes_are_0(loss: str, stack: int, root: Path) -> None:
    how = {"local": {**SKEWED["local"], "epochs": 1, "loss": loss}, "cohort": 6, "rounds": 1, "stack": stack}
    game = Game(make_run("fedavg", SKEWED, **how), root).play()
    rt = game.opened.rt
    for sent in game.sent:
        assert sent.message is not None
        who = sent.row["client"]
        want = by_hand(rt, who, game.opened.training[who], loss)
        assert distance(sent.message.open()[0], want) < 1e-5
    seen = [len(rt.data.y[r].unique()) for r in game.opened.training.values()]
    assert min(seen) < rt.data.classes and (game.largest_group > 1) == (stack > 1)
    plain = Game(make_run("fedavg", SKEWED, **{**how, "local": {**how["local"], "loss": "plain"}}), root).play()
    assert distance(plain.state, game.state) > 1e-3


@pytest.mark.parametrize("method", ["fedavg", "fedepth"])
def test_statistics_of_the_training_rows_make_accuracy_independent_of_batches(method: str, root: Path) -> None:
    def points(norm: str) -> list[dict[str, Any]]:
        games = [Game(make_run(method, **PRE, evaluate={"norm": norm, "batch": b}), root).play() for b in (5, 100)]
        return [g.opened.point(1, g.world) for g in games]

    (a, b), (c, d) = points("train"), points("batch")
    assert c["loss"] != pytest.approx(d["loss"], rel=1e-3), "a batch's own statistics are not those of another"
    # the statistics themselves are of batches of 5 and 100
    assert a["loss"] == pytest.approx(b["loss"], rel=0.2)


def test_statistics_are_those_of_the_rows(root: Path) -> None:
    game = Game(make_run("fedavg", **PRE, evaluate={"norm": "train", "batch": 1000}), root).play()
    opened, rt = game.opened, game.opened.rt
    point = opened.point(1, game.world)
    assert rt.statistics is not None and len(rt.statistics.known) == len(rt.statistics.layers) == 20
    net = rt.build()
    net.load_state_dict({n[6:]: t for n, t in game.state.items() if n.startswith("model/")})
    rows = torch.cat(list(opened.training.values())).sort().values
    x, _ = rt.data.batch(rows, rt.dtype)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.track_running_stats, m.momentum = True, None
            m.running_mean, m.running_var = torch.zeros(m.num_features), torch.ones(m.num_features)
            m.num_batches_tracked = torch.tensor(0)
    with torch.no_grad():
        net.train()(x)
        test = torch.cat(list(opened.testing.values())).sort().values
        z = torch.cat([net.eval()(rt.data.batch(r[None], rt.dtype)[0]) for r in test])
    y = rt.data.y[test]
    assert point["loss"] == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-4)
    assert point["accuracy"] == pytest.approx(float(np.mean((z.argmax(1) == y).numpy())))
