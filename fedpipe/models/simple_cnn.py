"""The CNN of pfl-research's CIFAR-10 benchmark (Granqvist et al., arXiv 2404.06430, and its published code)."""

from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.models.preresnet import Scaler, channels


class Pooled(nn.Module):
    """Two 3x3 convolutions without padding, ReLU after each, then 2x2 max-pool: the second ReLU runs after the pool,
    which is the same function on a quarter of the values. [batch, C, H, W] -> [batch, out, (H - 4) / 2, (W - 4) / 2].
    """

    def __init__(self, inward: int, mid: int, out: int, scale: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inward, mid, 3), nn.Conv2d(mid, out, 3)
        self.scaler = Scaler(scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scaler(F.relu(self.conv1(x)))
        return self.scaler(F.relu(F.max_pool2d(self.conv2(x), 2)))


def simple_cnn(
    shape: tuple[int, int, int],
    classes: int,
    width: float = 1.0,
    scale: float = 1.0,
    drop: tuple[float, float] = (0.25, 0.5),
) -> list[tuple[str, nn.Module]]:
    """Units stem (convolutions, pool), hidden (dropout, linear, ReLU), head (dropout, linear); 1,626,442 parameters for
    images of 3x32x32 and 10 classes. `drop` holds both rates."""
    mid, out, hidden = (channels(n, width) for n in (32, 64, 128))
    flat = out * ((shape[1] - 4) // 2) * ((shape[2] - 4) // 2)
    hide = [nn.Dropout(drop[0]), nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), Scaler(scale)]
    return [
        ("stem", Pooled(shape[0], mid, out, scale)),
        ("hidden", nn.Sequential(*hide)),
        ("head", nn.Sequential(nn.Dropout(drop[1]), nn.Linear(hidden, classes))),
    ]
