"""ResNet-18 and ResNet-34 (arXiv 1512.03385) with a 3x3 stem for small images, in widths as HeteroFL slices them."""

from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.errors import FedpipeError
from fedpipe.models.mobilenet import ConvNorm, Pooled
from fedpipe.models.preresnet import Norm, Scaler, channels, norm_layer

Units = list[tuple[str, nn.Module]]


class Basic(nn.Module):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x)): [batch, C, H, W] -> [batch, out, H/s, W/s].

    It has no `exits`: norm2 takes its statistics of all pixels that conv2 gives.
    """

    def __init__(self, inward: int, out: int, stride: int, changes: bool, norm: Norm, scale: float) -> None:
        super().__init__()
        self.first = ConvNorm(inward, out, 3, stride, 1, norm, scale)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.scaler = Scaler(scale)
        self.norm2 = norm_layer(norm, out)
        # the whole network's shape and not the widths decides, so that every width has the same tensors
        self.shortcut = nn.Conv2d(inward, out, 1, stride, bias=False) if changes else None
        self.norm3 = norm_layer(norm, out) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.scaler(self.conv2(self.first(x))))
        if self.shortcut is not None and self.norm3 is not None:
            x = self.norm3(self.scaler(self.shortcut(x)))
        return F.relu(out + x)


def _resnet(
    depths: tuple[int, ...], shape: tuple[int, int, int], classes: int, width: float, scale: float, norm: Norm
) -> Units:
    if shape[1] % 8 or shape[2] % 8:
        raise FedpipeError(f"model resnet: images of {shape[1]}x{shape[2]}; wanted sides divisible by 8")
    inward = channels(64, width)
    units: Units = [("stem", ConvNorm(shape[0], inward, 3, 1, 1, norm, scale))]
    for stage, depth in enumerate(depths):
        for k in range(depth):
            out, first = channels(64 * 2**stage, width), stage > 0 and k == 0
            units.append((f"b{len(units)}", Basic(inward, out, 2 if first else 1, first, norm, scale)))
            inward = out
    return [*units, ("head", Pooled(inward, classes))]


def resnet18(
    shape: tuple[int, int, int], classes: int, width: float = 1.0, scale: float = 1.0, norm: Norm = "running"
) -> Units:
    """Units stem, b1 .. b8, head for images (C, H, W) with sides divisible by 8; 11,173,962 parameters for 3 and 10.

    norm: running (statistics that are kept and used in evaluation), batch (those of the batch, always) or group."""
    return _resnet((2, 2, 2, 2), shape, classes, width, scale, norm)


def resnet34(
    shape: tuple[int, int, int], classes: int, width: float = 1.0, scale: float = 1.0, norm: Norm = "running"
) -> Units:
    """As `resnet18`, with units b1 .. b16; 21,282,122 parameters for 3 and 10."""
    return _resnet((3, 4, 6, 3), shape, classes, width, scale, norm)
