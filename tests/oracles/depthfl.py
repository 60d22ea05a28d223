"""DepthFL on a plain MLP with a classifier behind every hidden layer. Kim et al., ICLR 2023; its first author's code.

Layers are (W, b), W is [out, in]; `body` are the hidden ones in order, `heads` the classifiers, one for each.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Layer = tuple[Tensor, Tensor]
Batch = tuple[Tensor, Tensor]


def gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def outputs(body: Sequence[Layer], heads: Sequence[Layer], x: Tensor) -> list[Tensor]:
    """Logits of every classifier; the first hidden layers lie in one unit with the images' flattening."""
    out, h = [], x.reshape(len(x), -1)
    for k, (w, b) in enumerate(body):
        h = (gelu(h) if k else h) @ w.T + b
        if k:  # the stem has no classifier
            v, c = heads[k - 1]
            out.append(gelu(h) @ v.T + c)
    return out


def pull(round: int, ramp: int = 300) -> float:
    return math.exp(-5 * (1 - min(round, ramp) / ramp) ** 2)


def loss(zs: Sequence[Tensor], y: Tensor, weight: float) -> Tensor:
    """sum_i CE(o_i, y) + weight / (d - 1) sum_i sum_{j != i} KL(softmax(o_j), fixed || softmax(o_i)), batch means."""
    total = torch.zeros((), dtype=zs[0].dtype)
    for i, z in enumerate(zs):
        total = total + (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).mean()
        for j, other in enumerate(zs):
            if j != i:
                p = torch.softmax(other.detach(), 1)
                kl = (p * (torch.log(p) - torch.log_softmax(z, 1))).sum(1).mean()
                total = total + weight * kl / (len(zs) - 1)
    return total


def client(body: Sequence[Layer], heads: Sequence[Layer], batches: Sequence[Batch], lr: float, momentum: float,
           decay: float, weight: float) -> tuple[list[Layer], list[Layer]]:  # fmt: skip
    """Local SGD of the first d layers with their classifiers."""
    w = [t.clone() for layer in (*body, *heads) for t in layer]
    v = [torch.zeros_like(t) for t in w]

    def layers(flat: Sequence[Tensor]) -> tuple[list[Layer], list[Layer]]:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        return pairs[: len(body)], pairs[len(body) :]

    for x, y in batches:
        leaves = [t.clone().requires_grad_() for t in w]
        g = torch.autograd.grad(loss(outputs(*layers(leaves), x), y, weight), leaves)
        for i in range(len(w)):
            v[i] = momentum * v[i] + g[i] + decay * w[i]
            w[i] = w[i] - lr * v[i]
    return layers(w)


def mean(old: Layer, ends: Sequence[Layer]) -> Layer:
    """The plain mean over the clients that have a layer, the old one where none has."""
    if not ends:
        return old
    return sum(w for w, _ in ends) / len(ends), sum(b for _, b in ends) / len(ends)  # type: ignore[return-value]
