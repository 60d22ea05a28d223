"""FeDepth, straight from arXiv 2303.04887 and its published code, on a PreResNet-20 of its own.

A client downloads everything. For each of its blocks in depth order it trains the block's layers and the shared head
(and the stem, in the first block) on CE(head(link(features at the block's end)), y), all else frozen. SGD with
momentum: new for each block's layers, the head's goes on through the client's round. It uploads everything; the server
takes the mean weighted by samples.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

Batch = tuple[Tensor, Tensor]  # images [n, C, H, W], labels [n]
Batches = Callable[[int], Sequence[Batch]]
Sizes = tuple[int, int, int]
SIZES: Sizes = (16, 32, 64)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise each channel by the batch's own mean and (biased) variance."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    variance = (centred * centred).mean((0, 2, 3), keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * weight[:, None, None] + bias[:, None, None]


class Net(nn.Module):
    """Nine pre-activation blocks in three stages. Parameters are named first, 1 .. 9 and last. Values come by `put`."""

    def __init__(self, channels: int, classes: int, sizes: Sizes = SIZES, rate: float = 1.0):
        super().__init__()
        self.rate = rate  # what activations are divided by before each norm (HeteroFL)
        self.last = sizes[2]
        shapes: dict[str, tuple[int, ...]] = {"first conv": (sizes[0], channels, 3, 3), "first norm": (sizes[0],)}
        inward = sizes[0]
        for k in range(1, 10):
            out = sizes[(k - 1) // 3]
            shapes |= {f"{k} norm a": (inward,), f"{k} conv a": (out, inward, 3, 3)}
            shapes |= {f"{k} norm b": (out,), f"{k} conv b": (out, out, 3, 3)}
            if k in (4, 7):
                shapes[f"{k} shortcut"] = (out, inward, 1, 1)
            inward = out
        shapes |= {"last norm": (inward,), "last linear": (classes, inward)}
        self.w = nn.ParameterDict()
        for name, shape in shapes.items():
            self.w[name] = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
            if "norm" in name or "linear" in name:
                self.w[f"{name} bias"] = nn.Parameter(torch.zeros(shape[0], dtype=torch.float64))

    def put(self, values: dict[str, Tensor]) -> "Net":
        assert values.keys() == self.w.keys()
        with torch.no_grad():
            for name, value in values.items():
                assert self.w[name].shape == value.shape, name
                self.w[name].copy_(value)
        return self

    def take(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.w.items()}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return batch_norm(x / self.rate, self.w[name], self.w[f"{name} bias"])

    def forward(self, x: Tensor, end: int = 9) -> Tensor:
        """Logits of the features after block `end`."""
        z = self.norm(conv2d(x, self.w["first conv"], padding=1), "first norm")
        for k in range(1, end + 1):
            stride = 2 if k in (4, 7) else 1
            h = torch.relu(self.norm(z, f"{k} norm a"))
            z = conv2d(h, self.w[f"{k} conv a"], stride=stride, padding=1)
            z = conv2d(torch.relu(self.norm(z, f"{k} norm b")), self.w[f"{k} conv b"], padding=1)
            z = z + (conv2d(h, self.w[f"{k} shortcut"], stride=stride) if stride == 2 else h)
        step = {1: 4, 2: 2, 3: 1}[(end - 1) // 3 + 1]
        z = z[:, :, ::step, ::step]
        missing = self.last - z.shape[1]
        before = torch.zeros(len(z), missing // 2, *z.shape[2:], dtype=z.dtype)
        after = torch.zeros(len(z), missing - missing // 2, *z.shape[2:], dtype=z.dtype)
        z = torch.relu(self.norm(torch.cat([before, z, after], 1), "last norm"))
        return z.mean((2, 3)) @ self.w["last linear"].T + self.w["last linear bias"]


def names() -> dict[str, str]:
    """Names of Net's parameters -> the package's."""
    parts = {"norm a": "norm1", "conv a": "conv1", "norm b": "norm2", "conv b": "conv2", "shortcut": "shortcut"}
    out = {}
    for name in Net(1, 1).w:
        stem, _, rest = name.removesuffix(" bias").partition(" ")
        unit = {"first": "stem", "last": "head"}.get(stem, f"b{stem}")
        out[name] = f"{unit}.{parts.get(rest, rest)}.{'bias' if name.endswith(' bias') else 'weight'}"
    return out


def client(start: dict[str, Tensor], net: Net, blocks: Sequence[Sequence[int]], batches: Batches, lr: float,
           momentum: float, decay: float, carry: bool = True) -> dict[str, Tensor]:  # fmt: skip
    """What a client uploads: `blocks` are layer numbers, e.g. [[1, 2], [3, ..., 9]]; batches(j) those of block j.

    Without `carry` the head's momentum is new for each block too: another method, to tell the two apart.
    """
    net.put(start)
    head = [n for n in net.w if n.startswith("last")]
    carried = {n: torch.zeros_like(net.w[n]) for n in head}
    for j, block in enumerate(blocks):
        units = [str(k) for k in block] + ["last"] + (["first"] if j == 0 else [])
        trained = [n for n in net.w if n.split()[0] in units]
        for n, p in net.w.items():
            p.requires_grad_(n in trained)
        before = net.take()
        v = {n: carried[n] if n in head and carry else torch.zeros_like(net.w[n]) for n in trained}
        for x, y in batches(j):
            z = net(x, end=block[-1])
            loss = (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).mean()
            gradients = torch.autograd.grad(loss, [net.w[n] for n in trained])
            with torch.no_grad():
                for n, g in zip(trained, gradients, strict=True):
                    v[n] = momentum * v[n] + g + decay * net.w[n]
                    net.w[n] -= lr * v[n]
        assert all(torch.equal(net.w[n], before[n]) for n in net.w if n not in trained)
        carried = {n: v[n] for n in head}
    return net.take()


def mean(uploads: Sequence[dict[str, Tensor]], samples: Sequence[int]) -> dict[str, Tensor]:
    """sum_k n_k W_k / sum_k n_k over every tensor, trained or not."""
    total = {k: torch.zeros_like(t) for k, t in uploads[0].items()}
    for n, upload in zip(samples, uploads, strict=True):
        total = {k: s + n * upload[k] for k, s in total.items()}
    return {k: s / sum(samples) for k, s in total.items()}
