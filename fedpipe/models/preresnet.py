"""PreResNet-20 as FeDepth trains it (arXiv 2303.04887 and its published code), in widths as HeteroFL slices them.

The identity shortcut adds h = relu(norm1(x)), not x, and the stem's norm has no ReLU: both as in the published code;
`shortcut: x` adds x, as the textbook (arXiv 1603.05027). Batch norms are affine and use the statistics of the batch in
training and in evaluation.
"""

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.errors import FedpipeError
from fedpipe.kernels.common import Backend
from fedpipe.models.norms import norm_relu
from fedpipe.recompute import Conv, ConvAndShortcut

Units = list[tuple[str, nn.Module]]
Norm = Literal["batch", "running", "group"]


class Scaler(nn.Module):
    """Divides activations by a narrow model's width rate, in training only (HeteroFL, arXiv 2010.01264)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return x / self.rate if self.training and self.rate != 1 else x


def channels(count: int, width: float) -> int:
    """The first ceil(width * count) channels; a product a rounding error above a whole number is that number."""
    if not 0 < width <= 1:
        raise FedpipeError(f"width: {width} is not in (0, 1]")
    return math.ceil(round(width * count, 9))


def norm_layer(kind: Norm, count: int) -> nn.Module:
    """A norm of `count` channels: by the batch, by the batch with running statistics for evaluation, or by groups."""
    if kind == "batch":
        return nn.BatchNorm2d(count, track_running_stats=False)
    if kind == "running":
        return nn.BatchNorm2d(count)
    if kind == "group":
        return nn.GroupNorm(math.gcd(4, count), count)
    raise FedpipeError(f"norm: {kind!r}; wanted batch, running or group")


class Stem(nn.Module):
    """3x3 convolution without bias, then norm: [batch, C, H, W] -> [batch, out, H, W]."""

    def __init__(self, inward: int, out: int, norm: Norm, scale: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inward, out, 3, padding=1, bias=False)
        self.scaler = Scaler(scale)
        self.norm = norm_layer(norm, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.scaler(self.conv(x)))


class Thinned(nn.Conv2d):
    """A convolution without bias, of whose output only every k-th pixel may be asked: then its stride is k times as
    large, and the pixels are the same."""

    def forward(self, x: Tensor, every: int = 1) -> Tensor:
        return F.conv2d(x, self.weight, None, tuple(s * every for s in self.stride), self.padding)


class Skip(nn.Identity):
    """x, or every k-th pixel of it."""

    def forward(self, x: Tensor, every: int = 1) -> Tensor:
        return x[..., ::every, ::every] if every > 1 else x


class Block(nn.Module):
    """h = relu(norm1(x)); conv2(relu(norm2(conv1(h)))) + shortcut(h): [batch, C, H, W] -> [batch, out, H/s, W/s]; with
    `passes` and without a stride + x.

    Saved for the backward are both norms' inputs and outputs; at level 1 their inputs alone. Nothing follows conv2 and
    the shortcut that looks at other pixels, so the block may give some of them only.
    """

    levels = (0, 1)
    exits = True

    def __init__(self, inward: int, out: int, stride: int, norm: Norm, scale: float, passes: bool = False) -> None:
        super().__init__()
        self.passes = passes and stride == 1
        self.scaler = Scaler(scale)
        self.norm1 = norm_layer(norm, inward)
        self.conv1 = nn.Conv2d(inward, out, 3, stride, padding=1, bias=False)
        self.norm2 = norm_layer(norm, out)
        self.conv2 = Thinned(out, out, 3, padding=1, bias=False)
        # stride and not the widths decides, so that every width has the same tensors
        self.shortcut = Skip() if stride == 1 else Thinned(inward, out, 1, stride, bias=False)

    def forward(self, x: Tensor, level: int = 0, backend: Backend = "auto", every: int = 1) -> Tensor:
        if level:
            filters = [] if isinstance(self.shortcut, nn.Identity) else [self.shortcut.weight]
            stride = self.conv1.stride[0]
            first = Conv(stride) if self.passes else ConvAndShortcut(stride, every)
            made = norm_relu(self.norm1, self.scaler(x), first, (self.conv1.weight, *filters), backend)
            (out,) = norm_relu(self.norm2, self.scaler(made[0]), Conv(every), (self.conv2.weight,), backend)
            return out + (self.shortcut(x, every) if self.passes else made[1])
        h = F.relu(self.norm1(self.scaler(x)))
        aside = x if self.passes else h
        # few pixels of it are taken first: their gradient, as large as it, then comes into being last
        short = self.shortcut(aside, every) if every > 1 else None
        out = self.conv2(F.relu(self.norm2(self.scaler(self.conv1(h)))), every)
        return out + (self.shortcut(aside) if short is None else short)


class Head(nn.Module):
    """norm, ReLU, global average pool, linear: [batch, C, H, W] -> [batch, classes].

    Where every unit has a head, none has the ReLU (m-FeDepth's published code).
    """

    def __init__(self, inward: int, classes: int, norm: Norm, scale: float) -> None:
        super().__init__()
        self.kind: Norm = norm
        self.relu = True
        self.scaler = Scaler(scale)
        self.norm = norm_layer(norm, inward)
        self.linear = nn.Linear(inward, classes)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.scaler(x))
        return self.linear((F.relu(z) if self.relu else z).mean((-2, -1)))

    def behind(self, shape: tuple[int, ...]) -> "Head":
        """A head for features of another shape, one of many."""
        self.relu = False
        head = Head(shape[0], self.linear.out_features, self.kind, self.scaler.rate)
        head.relu = False
        return head


def preresnet20(
    shape: tuple[int, int, int], classes: int, width: float = 1.0, scale: float = 1.0, norm: Norm = "batch",
    shortcut: Literal["h", "x"] = "h",
) -> Units:  # fmt: skip
    """Units stem, b1 .. b9, head for images (C, H, W) with H and W divisible by 4; 272,314 parameters for 3 and 10.

    `width` keeps the first ceil(width * C) channels everywhere but at input and output; `scale` divides the input of
    every norm in training; norm `group` takes four groups (fewer where four do not divide the channels).
    """
    if shape[1] % 4 or shape[2] % 4:
        raise FedpipeError(
            f"model preresnet20: images of {shape[1]}x{shape[2]}; height and width must be divisible by 4"
        )
    if shortcut not in ("h", "x"):
        raise FedpipeError(f"model preresnet20: shortcut {shortcut!r}; wanted h or x")
    c1, c2, c3 = (channels(c, width) for c in (16, 32, 64))
    inward = [c1, c1, c1, c1, c2, c2, c2, c3, c3]
    out = [c1, c1, c1, c2, c2, c2, c3, c3, c3]
    units: Units = [("stem", Stem(shape[0], c1, norm, scale))]
    for k, (i, o) in enumerate(zip(inward, out, strict=True), 1):
        units.append((f"b{k}", Block(i, o, 2 if k in (4, 7) else 1, norm, scale, shortcut == "x")))
    return [*units, ("head", Head(c3, classes, norm, scale))]
