"""MobileNetV1 (arXiv 1704.04861) for small images, as FedBABU trains it (arXiv 2106.06042 and its published code), and
the four-convolution network beside it. Batch norms use the statistics of the batch in training and in evaluation."""

from math import prod

from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.errors import FedpipeError
from fedpipe.models.preresnet import Norm, Scaler, channels, norm_layer

Units = list[tuple[str, nn.Module]]
# output channels and stride of the thirteen blocks
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)


class ConvNorm(nn.Module):
    """Convolution, norm, ReLU: [batch, C, H, W] -> [batch, out, H/s, W/s].

    What ends with it has no `exits`: the norm takes its statistics of all pixels, those that a link drops, too.
    """

    def __init__(
        self, inward: int, out: int, size: int, stride: int, groups: int, norm: Norm, scale: float, bias: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inward, out, size, stride, size // 2, groups=groups, bias=bias)
        self.scaler = Scaler(scale)
        self.norm = norm_layer(norm, out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.scaler(self.conv(x))))


class Separable(nn.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution over them."""

    def __init__(self, inward: int, out: int, stride: int, norm: Norm, scale: float) -> None:
        super().__init__()
        self.depthwise = ConvNorm(inward, inward, 3, stride, inward, norm, scale)
        self.pointwise = ConvNorm(inward, out, 1, 1, 1, norm, scale)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class Pooled(nn.Module):
    """Global average pool, linear: [batch, C, H, W] -> [batch, classes]."""

    def __init__(self, inward: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inward, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.mean((-2, -1)))
        return out

    def behind(self, shape: tuple[int, ...]) -> "Pooled":
        """A head for features of another shape."""
        return Pooled(shape[0], self.linear.out_features)


def mobilenet(
    shape: tuple[int, int, int], classes: int, width: float = 1.0, scale: float = 1.0, norm: Norm = "batch"
) -> Units:
    """Units stem, b1 .. b13, head for images (C, H, W) with sides divisible by 16; 3,309,476 parameters for 3 and 100.

    `width` keeps the first ceil(width * C) channels; `scale` divides the input of every norm in training.
    """
    if shape[1] % 16 or shape[2] % 16:
        raise FedpipeError(f"model mobilenet: images of {shape[1]}x{shape[2]}; wanted sides divisible by 16")
    inward = channels(32, width)
    units: Units = [("stem", ConvNorm(shape[0], inward, 3, 1, 1, norm, scale))]
    for k, (wide, stride) in enumerate(BLOCKS, 1):
        out = channels(wide, width)
        units.append((f"b{k}", Separable(inward, out, stride, norm, scale)))
        inward = out
    return [*units, ("head", Pooled(inward, classes))]


class Halved(nn.Module):
    """Convolution with bias, norm, ReLU, 2x2 maximum: [batch, C, H, W] -> [batch, out, H/2, W/2]."""

    def __init__(self, inward: int, out: int, norm: Norm, scale: float) -> None:
        super().__init__()
        self.part = ConvNorm(inward, out, 3, 1, 1, norm, scale, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.part(x), 2)


def cnn4(
    shape: tuple[int, int, int], classes: int, width: float = 1.0, scale: float = 1.0, norm: Norm = "batch"
) -> Units:
    """Units stem, b1, b2, b3 of 64 channels, head, for images (C, H, W) with sides divisible by 16; 115,658 parameters
    for 3x32x32 and 10."""
    if shape[1] % 16 or shape[2] % 16:
        raise FedpipeError(f"model cnn4: images of {shape[1]}x{shape[2]}; wanted sides divisible by 16")
    wide = channels(64, width)
    units: Units = [("stem", Halved(shape[0], wide, norm, scale))]
    units += [(f"b{k}", Halved(wide, wide, norm, scale)) for k in (1, 2, 3)]
    flat = wide * (shape[1] // 16) * (shape[2] // 16)
    return [*units, ("head", Flat(flat, classes))]


class Flat(nn.Sequential):
    """Linear over all features: [batch, ...] -> [batch, classes]."""

    def __init__(self, inward: int, classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(inward, classes))
        self.classes = classes

    def behind(self, shape: tuple[int, ...]) -> "Flat":
        """A head for features of another shape."""
        return Flat(prod(shape), self.classes)
