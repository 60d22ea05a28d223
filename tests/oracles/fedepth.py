"""FeDepth, straight from arXiv 2303.04887 and its published code, on a PreResNet-20 of its own.

A client downloads everything. For each of its blocks in depth order it trains the block's layers and the shared head
(and the stem, in the first block) on CE(head(link(features at the block's end)), y), all else frozen. SGD with
momentum: new for each block's layers, the head's goes on through the client's round. It uploads everything; the server
takes the mean weighted by samples. A client that lacks memory leaves its first layers out of the forward; one with
memory for two trains a peer beside the model, each on its cross-entropy and the KL divergence from what the other
gives. m-FeDepth: every layer has a head of its own, norm, mean, linear, in the place of link and shared head. Its
published code weighs these in the mean, and never trains the last of six blocks.
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

    def __init__(self, channels: int, classes: int, sizes: Sizes = SIZES, rate: float = 1.0, heads: bool = False):
        super().__init__()
        self.rate = rate  # what activations are divided by before each norm (HeteroFL)
        self.heads = heads
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
            if heads and k < 9:
                shapes |= {f"{k}th norm": (out,), f"{k}th linear": (classes, out)}
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

    def forward(self, x: Tensor, end: int = 9, skip: int = 0) -> Tensor:
        """Logits of the features after block `end`, the first `skip` blocks left out."""
        z = self.norm(conv2d(x, self.w["first conv"], padding=1), "first norm")
        for k in range(1 + skip, end + 1):
            stride = 2 if k in (4, 7) else 1
            h = torch.relu(self.norm(z, f"{k} norm a"))
            z = conv2d(h, self.w[f"{k} conv a"], stride=stride, padding=1)
            z = conv2d(torch.relu(self.norm(z, f"{k} norm b")), self.w[f"{k} conv b"], padding=1)
            z = z + (conv2d(h, self.w[f"{k} shortcut"], stride=stride) if stride == 2 else h)
        if self.heads:
            own = f"{end}th" if end < 9 else "last"
            pooled = self.norm(z, f"{own} norm").mean((2, 3))
            return pooled @ self.w[f"{own} linear"].T + self.w[f"{own} linear bias"]
        step = {1: 4, 2: 2, 3: 1}[(end - 1) // 3 + 1]
        z = z[:, :, ::step, ::step]
        missing = self.last - z.shape[1]
        before = torch.zeros(len(z), missing // 2, *z.shape[2:], dtype=z.dtype)
        after = torch.zeros(len(z), missing - missing // 2, *z.shape[2:], dtype=z.dtype)
        z = torch.relu(self.norm(torch.cat([before, z, after], 1), "last norm"))
        return z.mean((2, 3)) @ self.w["last linear"].T + self.w["last linear bias"]


def names(heads: bool = False) -> dict[str, str]:
    """Names of Net's parameters -> the package's."""
    parts = {"norm a": "norm1", "conv a": "conv1", "norm b": "norm2", "conv b": "conv2", "shortcut": "shortcut"}
    out = {}
    for name in Net(1, 1, heads=heads).w:
        stem, _, rest = name.removesuffix(" bias").partition(" ")
        exits = {f"{k}th": f"exit_b{k}" for k in range(1, 9)}
        unit = {"first": "stem", "last": "head", **exits}.get(stem, f"b{stem}")
        out[name] = f"{unit}.{parts.get(rest, rest)}.{'bias' if name.endswith(' bias') else 'weight'}"
    return out


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).mean()


def head_of(net: Net, block: Sequence[int]) -> str:
    return f"{block[-1]}th" if net.heads and block[-1] < 9 else "last"


def trained_in(net: Net, blocks: Sequence[Sequence[int]], j: int) -> list[str]:
    """Parameters that block j trains."""
    units = [*(str(k) for k in blocks[j]), head_of(net, blocks[j]), *(["first"] if j == 0 else [])]
    return [n for n in net.w if n.split()[0] in units]


def in_published_phase(net: Net, blocks: Sequence[Sequence[int]], j: int) -> list[str]:
    """Parameters that have gradients in phase j of the published code with torch 1.7.

    For the last of six blocks m-FeDepth's enables the last head, disables that block's layers and leaves all else as it
    is: the block before is enabled, and the loss is that of all layers. (So is its head, which is not in that loss.)
    """
    if not net.heads or (len(blocks), j) != (6, 5):
        return trained_in(net, blocks, j)
    return [n for n in net.w if n.split()[0] in [*(str(k) for k in blocks[4]), "last"]]


def client(start: dict[str, Tensor], net: Net, blocks: Sequence[Sequence[int]], batches: Batches, lr: float,
           momentum: float, decay: float, carry: bool = True, faithful: bool = False) -> dict[str, Tensor]:  # fmt: skip
    """What a client uploads: `blocks` are layer numbers, e.g. [[1, 2], [3, ..., 9]]; batches(j) those of block j.
    Layers before the first block's are left out.

    Without `carry` the head's momentum is new for each block too: another method, to tell the two apart. faithful: one
    optimizer for the whole round, in which frozen parameters have gradients of 0.
    """
    net.put(start)
    v = {n: torch.zeros_like(p) for n, p in net.w.items()}
    for j, block in enumerate(blocks):
        trained = (in_published_phase if faithful else trained_in)(net, blocks, j)
        for n, p in net.w.items():
            p.requires_grad_(n in trained)
            if not faithful and not (carry and n.startswith("last")):
                v[n] = torch.zeros_like(p)
        before = net.take()
        for x, y in batches(j):
            loss = cross_entropy(net(x, end=block[-1], skip=blocks[0][0] - 1), y)
            gradients = dict(zip(trained, torch.autograd.grad(loss, [net.w[n] for n in trained]), strict=True))
            with torch.no_grad():
                for n, p in net.w.items():
                    if faithful or n in trained:
                        v[n] = momentum * v[n] + gradients.get(n, torch.zeros_like(p)) + decay * p
                        p -= lr * v[n]
        assert faithful or all(torch.equal(net.w[n], before[n]) for n in net.w if n not in trained)
    return net.take()


def mutual(start: dict[str, Tensor], peer: dict[str, Tensor], nets: tuple[Net, Net], batches: Sequence[Batch],
           lr: float, momentum: float, decay: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """What a client with memory for two uploads, and the peer it keeps: both step on the same batch."""
    a, b = nets[0].put(start), nets[1].put(peer)
    v = [{n: torch.zeros_like(p) for n, p in net.w.items()} for net in (a, b)]
    for net in (a, b):
        for p in net.w.values():
            p.requires_grad_(True)
    for x, y in batches:
        za, zb = a(x), b(x)
        pa, pb = torch.softmax(za, 1), torch.softmax(zb, 1)
        la = cross_entropy(za, y) + (pb.detach() * (pb.detach().log() - pa.log())).sum(1).mean()
        lb = cross_entropy(zb, y) + (pa.detach() * (pa.detach().log() - pb.log())).sum(1).mean()
        for net, loss, velocity in ((a, la, v[0]), (b, lb, v[1])):
            gradients = torch.autograd.grad(loss, list(net.w.values()))
            with torch.no_grad():
                for (n, p), g in zip(net.w.items(), gradients, strict=True):
                    velocity[n] = momentum * velocity[n] + g + decay * p
                    p -= lr * velocity[n]
    return a.take(), b.take()


def mean(uploads: Sequence[dict[str, Tensor]], samples: Sequence[int]) -> dict[str, Tensor]:
    """sum_k n_k W_k / sum_k n_k over every tensor, trained or not."""
    total = {k: torch.zeros_like(t) for k, t in uploads[0].items()}
    for n, upload in zip(samples, uploads, strict=True):
        total = {k: s + n * upload[k] for k, s in total.items()}
    return {k: s / sum(samples) for k, s in total.items()}


def mean_by_head(old: dict[str, Tensor], uploads: Sequence[dict[str, Tensor]], samples: Sequence[int],
                 trained: Sequence[set[str]]) -> dict[str, Tensor]:  # fmt: skip
    """`mean`, but of each head over the clients that trained it (`trained`: names of each); `old` where nobody did."""
    new = mean(uploads, samples)
    for name in (n for n in new if "th " in n or n.startswith("last")):
        who = [i for i, mine in enumerate(trained) if name in mine]
        total = sum(samples[i] for i in who)
        new[name] = sum((samples[i] * uploads[i][name] for i in who), torch.zeros_like(old[name]))
        new[name] = new[name] / total if who else old[name]
    return new


def mean_by_published_weights(uploads: Sequence[dict[str, Tensor]], samples: Sequence[int],
                              blocks: Sequence[Sequence[Sequence[int]]]) -> dict[str, Tensor]:  # fmt: skip
    """`mean`, but 4 times what clients sent of heads 1 and 5 and twice of 2, 3 and 4 where one of their blocks ends
    there, nothing where not, over the samples of all the same."""
    new = mean(uploads, samples)
    for k, weight in {1: 4, 2: 2, 3: 2, 4: 2, 5: 4}.items():
        who = [i for i, mine in enumerate(blocks) if k in [block[-1] for block in mine]]
        for name in (n for n in new if n.startswith(f"{k}th ")):
            sent = sum((weight * samples[i] * uploads[i][name] for i in who), torch.zeros_like(new[name]))
            new[name] = sent / sum(samples)
    return new
