"""Predicted peaks: by hand for one layer, against the allocator for real steps, and without allocating anything."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.config import ModelSpec
from fedpipe.errors import FedpipeError
from fedpipe.memory import Peak, Trace, tensor_bytes, traced_peak
from fedpipe.models.build import load
from fedpipe.models.chain import Chain
from fedpipe.seeding import seeded
from fedpipe.types import Tensors

IMAGE = (3, 16, 16)


def chain_of(name: str = "preresnet20", **extra: object) -> Chain:
    with seeded(0):
        return load(ModelSpec(name=name), IMAGE, 10, **extra)


def state(chain: Chain) -> Tensors:
    return {n: p.detach() for n, p in chain.named_parameters()}


def train(chain: Chain, at: Tensors, batch: int, adam: bool = False, upto: str | None = None, live: str = "") -> None:
    """Two steps of the units named in `live` (all when empty)."""
    leaves = {n: t.detach().requires_grad_() for n, t in at.items() if not live or n.split(".")[0] in live.split()}
    parameters = list(leaves.values())
    opt = torch.optim.AdamW(parameters) if adam else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    dtype = parameters[0].dtype
    for _ in range(2):
        x, y = torch.empty(batch, *IMAGE, dtype=dtype).fill_(0.1), torch.empty(batch, dtype=torch.int64).fill_(1)
        loss = F.cross_entropy(torch.func.functional_call(chain, at | leaves, (x,), {"upto": upto}), y)
        if not torch.isfinite(loss):
            raise FedpipeError("not finite")
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = g
        opt.step()
        opt.zero_grad()


def predicted_and_measured(chain: Chain, *args: object, **kwargs: object) -> tuple[int, int]:
    at = state(chain)
    predicted = traced_peak(lambda fake: train(chain, fake, *args, **kwargs), at)
    train(chain, at, *args, **kwargs)
    with Peak(at.values()) as peak:
        train(chain, at, *args, **kwargs)
    return predicted, peak.bytes


def test_the_peak_of_one_layer_is_that_counted_by_hand() -> None:
    def linear(at: Tensors) -> None:
        w = at["w"].detach().requires_grad_()
        z = torch.empty(8, 16).fill_(1.0) @ w.T
        torch.autograd.grad(z, w, torch.ones_like(z))

    weights, x, z = 4 * 24 * 16, 4 * 8 * 16, 4 * 8 * 24
    by_hand = weights + x + z + z + weights  # held, input, output, its gradient, the weights' gradient
    at = {"w": torch.zeros(24, 16)}
    assert traced_peak(linear, at) == by_hand
    with Peak(at.values()) as peak:
        linear(at)
    assert peak.bytes == by_hand


def test_storages_are_counted_once_and_as_long_as_they_live() -> None:
    with Trace() as trace:
        a = torch.empty(100)
        b = a.view(10, 10)[2:]
        assert trace.now == 400
        c = b + 1
        assert trace.now == 400 + 320
        c.view(-1).add_(1)
        del a
        assert trace.now == 720
        del b, c
        assert trace.now == 0
        with trace.span({"model/x": torch.empty(10)}) as span:
            torch.empty(50)
        assert span.bytes == 40 + 200
    assert trace.peak == 720
    x = torch.zeros(100)
    assert tensor_bytes([x, x[3:], x.view(4, 25)]) == 400


@pytest.mark.parametrize(
    ("name", "batch", "extra", "run"),
    [
        ("preresnet20", 8, {}, {}),
        ("preresnet20", 64, {}, {"adam": True}),
        ("preresnet20", 16, {"width": 0.5}, {}),
        ("preresnet20", 32, {}, {"upto": "b7", "live": "b7 head"}),
        ("mlp", 16, {}, {"adam": True}),
        ("cnn", 32, {}, {}),
        ("cnn4", 16, {}, {"adam": True}),
        ("mobilenet", 16, {}, {}),
        ("mobilenet", 64, {}, {"upto": "b1", "live": "stem b1 head"}),
        ("resnet18", 8, {"norm": "batch"}, {"upto": "b4", "live": "b3 b4 head"}),
        ("vit_tiny", 16, {"depth": 3}, {"adam": True}),
    ],
)
def test_a_prediction_is_within_one_percent_of_the_allocators_peak(
    name: str, batch: int, extra: dict, run: dict
) -> None:
    predicted, measured = predicted_and_measured(chain_of(name, **extra), batch, **run)
    assert abs(predicted / measured - 1) < 0.01, (predicted, measured)


@pytest.mark.parametrize(("batch", "channels", "stride", "side"), [(16, 512, 1, 4), (48, 94, 2, 16), (8, 1024, 1, 2)])
def test_a_filter_per_channel_is_predicted(batch: int, channels: int, stride: int, side: int) -> None:
    """A depthwise convolution blocks its filters, not their one channel; on images smaller than them it copies none."""
    w = torch.randn(channels, 1, 3, 3)
    geometry = ([stride, stride], [1, 1], [1, 1], False, [0, 0], channels)

    def both(at: Tensors) -> None:
        x = at["x"]
        y = torch.ops.aten.convolution(x, at["w"], None, *geometry)
        torch.ops.aten.convolution_backward(y, x, at["w"], None, *geometry, [True, True, False])

    at = {"x": torch.randn(batch, channels, side, side), "w": w}
    both(at)
    with Peak(at.values()) as peak:
        both(at)
    assert traced_peak(both, at) == pytest.approx(peak.bytes, rel=1e-3)


def test_float64_unfolds_columns() -> None:
    chain = chain_of("cnn").double()
    predicted, measured = predicted_and_measured(chain, 16)
    assert abs(predicted / measured - 1) < 0.01, (predicted, measured)


def test_narrow_layers_are_predicted_from_above() -> None:
    predicted, measured = predicted_and_measured(chain_of(width=0.165), 16)
    assert measured * 0.99 <= predicted <= measured * 1.1, (predicted, measured)


def test_training_a_late_block_takes_less() -> None:
    chain = chain_of()
    parts = [{}, {"upto": "b9", "live": "b7 b8 b9 head"}, {"upto": "b9", "live": "b9 head"}]
    peaks = [traced_peak(lambda at, part=p: train(chain, at, 32, **part), state(chain)) for p in parts]
    assert peaks[0] > peaks[1] > peaks[2] > tensor_bytes(chain.parameters())


def test_stacked_clients_take_more_than_one_and_less_than_their_sum_of_models() -> None:
    chain = chain_of("mlp")

    def step(at: Tensors, clients: int) -> None:
        x, y = torch.empty(clients, 8, *IMAGE), torch.zeros(clients, 8, dtype=torch.int64)

        def loss(p: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(chain, p, (x,)), y)

        torch.func.vmap(torch.func.grad(loss))(at, x, y)

    peaks = [
        traced_peak(lambda at, n=n: step(at, n), {k: torch.stack([t] * n) for k, t in state(chain).items()})
        for n in (1, 4)
    ]
    assert abs(peaks[1] / peaks[0] - 4) < 0.1


def test_a_trace_of_a_billion_parameters_allocates_nothing() -> None:
    with torch.device("meta"):
        layers = [("stem", nn.Sequential(nn.Flatten(), nn.Linear(16, 22_000)))]
        layers += [(f"h{k}", nn.Linear(22_000, 22_000)) for k in range(2)]
        chain = Chain([*layers, ("head", nn.Linear(22_000, 2))], (1, 4, 4))
    count = sum(p.numel() for p in chain.parameters())
    assert count > 9e8

    def step(at: Tensors) -> None:
        leaves = {n: t.requires_grad_() for n, t in at.items()}
        z = torch.func.functional_call(chain, leaves, (torch.empty(2, 1, 4, 4),))
        torch.autograd.grad(z.sum(), list(leaves.values()))

    with Peak() as real:
        predicted = traced_peak(step, {n: p.detach() for n, p in chain.named_parameters()})
    assert real.bytes < 2**20
    assert predicted > 2 * 4 * count


def test_a_trace_repeats_itself_and_leaves_nothing_behind() -> None:
    chain, before = chain_of(), torch.get_rng_state()
    weights = {n: t.clone() for n, t in state(chain).items()}
    first = traced_peak(lambda at: train(chain, at, 8), state(chain))
    assert traced_peak(lambda at: train(chain, at, 8), state(chain)) == first
    assert gc.isenabled() and type(torch.empty(1)) is Tensor
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(t, weights[n]) for n, t in state(chain).items())


def test_a_size_that_depends_on_values_is_refused() -> None:
    with pytest.raises(FedpipeError, match="depends on values"):
        traced_peak(lambda at: at["x"].nonzero(), {"x": torch.zeros(3)})


def test_a_real_scalar_keeps_its_value_and_a_fake_one_is_one() -> None:
    seven = torch.tensor(7.0)
    with Trace() as trace:
        assert torch.tensor(3).item() == 3 and seven.item() == 7
        assert trace.fake({"x": torch.zeros(())})["x"].item() == 1


def test_garbage_of_an_earlier_measurement_changes_no_later_one() -> None:
    with Peak():
        kept: list[Any] = [torch.zeros(50_000)]
        kept.append(kept)
    size = kept[0].nbytes
    del kept
    with Peak() as peak:
        gc.collect()
        x = torch.ones(10_000)
    assert peak.bytes == x.nbytes < size
    assert gc.get_freeze_count() == 0 and gc.collect() > 0


def test_the_peak_of_a_block_counts_what_was_held_and_the_largest_rise() -> None:
    x = torch.zeros(1000)
    for _ in range(2):
        with Peak([x, x[1:]]) as peak:
            y = torch.empty(500)
            del y
            y = torch.empty(700)
            del y
        assert peak.bytes == 4000 + 2800


@pytest.mark.gpu
def test_the_peak_on_cuda_is_the_allocators() -> None:
    x = torch.zeros(1000, device="cuda")
    with Peak([x], device="cuda") as peak:
        del_me = torch.empty(2**20, device="cuda")
        del del_me
    assert peak.bytes == 4096 + 4 * 2**20


FIRST, LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    "orders", [(LAST, LAST, LAST), (LAST, FIRST, LAST), (FIRST, LAST, FIRST), (FIRST, FIRST, LAST)]
)
@pytest.mark.parametrize(
    ("batch", "inward", "outward", "side", "kernel", "stride", "groups"),
    [
        (16, 3, 16, 32, 3, 1, 1),
        (16, 32, 64, 16, 3, 2, 1),
        (16, 20, 50, 16, 5, 1, 1),
        (16, 64, 128, 16, 1, 2, 1),
        (10, 512, 512, 4, 3, 1, 1),
        (16, 128, 128, 16, 3, 1, 128),
        (16, 128, 128, 16, 3, 2, 128),
    ],
)
def test_convolutions_are_predicted_in_either_order(
    orders: tuple[torch.memory_format, ...],
    batch: int,
    inward: int,
    outward: int,
    side: int,
    kernel: int,
    stride: int,
    groups: int,
) -> None:
    """Of images, weights and incoming gradients: those that lie otherwise are copied; channels last, few are."""
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups)

    def forward(at: Tensors) -> None:
        torch.ops.aten.convolution(at["x"], at["w"], None, *geometry)

    def backward(at: Tensors) -> None:
        torch.ops.aten.convolution_backward(at["y"], at["x"], at["w"], None, *geometry, [True, True, False])

    x, w = torch.randn(batch, inward, side, side), torch.randn(outward, inward // groups, kernel, kernel)
    y = torch.ops.aten.convolution(x, w, None, *geometry)
    at = {n: t.contiguous(memory_format=o) for n, t, o in zip("xwy", (x, w, y), orders, strict=True)}
    for run in (forward, backward):
        with Peak(at.values()) as peak:
            run(at)
        assert traced_peak(run, at) == pytest.approx(peak.bytes, rel=0.02)


@pytest.mark.parametrize("orders", [(LAST, LAST), (LAST, FIRST), (FIRST, LAST), (FIRST, FIRST)])
def test_a_pools_backward_is_made_in_both_orders_where_they_differ(orders: tuple[torch.memory_format, ...]) -> None:
    x = torch.randn(8, 32, 16, 16).contiguous(memory_format=orders[0])
    y, best = torch.ops.aten.max_pool2d_with_indices(x, [2, 2], [2, 2])
    at = {"x": x, "y": y.contiguous(memory_format=orders[1]), "best": best}

    def backward(at: Tensors) -> None:
        torch.ops.aten.max_pool2d_with_indices_backward(
            at["y"], at["x"], [2, 2], [2, 2], [0, 0], [1, 1], False, at["best"]
        )

    with Peak(at.values()) as peak:
        backward(at)
    assert traced_peak(backward, at) == peak.bytes
