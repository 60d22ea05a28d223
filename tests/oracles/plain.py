"""Straight-line local SGD on a plain MLP, and FedAvg, FedProx and FedBABU with it.

Weights are lists [W1, b1, W2, b2, ...]; W is [out, in]. No torch.nn, no torch.optim.
FedAvg arXiv 1602.05629 algorithm 1; FedProx arXiv 1812.06127 equation 2; FedBABU arXiv 2106.06042 section 4.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Weights = list[Tensor]
Batch = tuple[Tensor, Tensor]  # images [n, ...], labels [n]
Gradient = Callable[[Weights, Batch], Weights]


def logits(w: Weights, x: Tensor, rate: float = 1.0) -> Tensor:
    """x W1' + b1, then for every further layer GELU and the layer; hidden layers' outputs are divided by `rate`."""
    z = x.reshape(len(x), -1)
    for k in range(0, len(w), 2):
        if k:
            z = z / rate
            z = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
        z = z @ w[k].T + w[k + 1]
    return z


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).mean()


def gradient(w: Weights, batch: Batch, rate: float = 1.0) -> Weights:
    leaves = [t.clone().requires_grad_() for t in w]
    return list(torch.autograd.grad(cross_entropy(logits(leaves, batch[0], rate), batch[1]), leaves))


def sgd(w: Weights, batches: Sequence[Batch], lr: float, momentum: float = 0.0, decay: float = 0.0,
        mu: float = 0.0, moving: int | None = None, rate: float = 1.0) -> Weights:  # fmt: skip
    """Local SGD from w: v <- momentum v + g + decay w, w <- w - lr v, v = 0 at the start.

    g is the batch's gradient, plus mu (w - start) (FedProx). Only the first `moving` tensors move (None: all).
    """
    start, w = w, list(w)
    v = [torch.zeros_like(t) for t in w]
    for batch in batches:
        g = gradient(w, batch, rate)
        for i in range(len(w) if moving is None else moving):
            v[i] = momentum * v[i] + g[i] + mu * (w[i] - start[i]) + decay * w[i]
            w[i] = w[i] - lr * v[i]
    return w


def mean(models: Sequence[Weights], weights: Sequence[float]) -> Weights:
    """sum_k n_k w_k / sum_k n_k, tensor by tensor."""
    total = [torch.zeros_like(t) for t in models[0]]
    for n, model in zip(weights, models, strict=True):
        total = [s + n * t for s, t in zip(total, model, strict=True)]
    return [s / sum(weights) for s in total]
