"""Small smooth networks: every derivative exists, so that gradients and identities can be checked closely."""

from collections.abc import Sequence

from torch import nn

from fedpipe.models.preresnet import Scaler, channels

Units = list[tuple[str, nn.Module]]


def mlp(
    shape: tuple[int, int, int],
    classes: int,
    hidden: Sequence[int] = (32, 32, 32),
    width: float = 1.0,
    scale: float = 1.0,
) -> Units:
    """Linear layers with GELU between: the stem gives hidden[0] features, unit h<k> hidden[k], the head the classes."""
    sizes = [channels(n, width) for n in hidden]
    inward = shape[0] * shape[1] * shape[2]
    units: Units = [("stem", nn.Sequential(nn.Flatten(), nn.Linear(inward, sizes[0]), Scaler(scale)))]
    for k, (i, o) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
        units.append((f"h{k}", nn.Sequential(nn.GELU(), nn.Linear(i, o), Scaler(scale))))
    return [*units, ("head", Smooth(sizes[-1], classes))]


class Smooth(nn.Sequential):
    """GELU, linear: [batch, features] -> [batch, classes]."""

    def __init__(self, inward: int, classes: int) -> None:
        super().__init__(nn.GELU(), nn.Linear(inward, classes))
        self.classes = classes

    def behind(self, shape: tuple[int, ...]) -> "Smooth":
        """A head for another number of features."""
        return Smooth(shape[0], self.classes)


def cnn(shape: tuple[int, int, int], classes: int, width: float = 1.0, scale: float = 1.0) -> Units:
    """Two 3x3 convolutions (16, then 32 channels at half the resolution) with GELU, global average pool, linear."""
    c1, c2 = channels(16, width), channels(32, width)
    stem = nn.Sequential(nn.Conv2d(shape[0], c1, 3, padding=1), Scaler(scale))
    c = nn.Sequential(nn.GELU(), nn.Conv2d(c1, c2, 3, stride=2, padding=1), Scaler(scale))
    pool = nn.Sequential(nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return [("stem", stem), ("c1", c), ("head", nn.Sequential(pool, nn.Linear(c2, classes)))]


def linear(shape: tuple[int, int, int], classes: int, scale: float = 1.0) -> Units:
    """One linear layer on the pixels: 30,730 parameters for images of 3x32x32 and 10 classes."""
    inward = shape[0] * shape[1] * shape[2]
    return [("stem", nn.Sequential(nn.Flatten(), Scaler(scale))), ("head", nn.Linear(inward, classes))]
