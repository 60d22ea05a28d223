"""From the output of any unit to the head, without parameters: skip connections with zero padding (FeDepth, arXiv
2303.04887, section 3)."""

from torch import Tensor
from torch.nn import functional as F

from fedpipe.errors import FedpipeError

Shape = tuple[int, ...]  # of one sample


def kept(have: Shape, want: Shape) -> int:
    """k where the link keeps every k-th pixel of both directions of feature maps (C, H, W); 1 for all others."""
    if len(have) != 3 or len(want) != 3:
        return 1
    k = max(1, have[1] // want[1])
    return k if have[1:] == (k * want[1], k * want[2]) else 1


def link(x: Tensor, want: Shape, unit: str) -> Tensor:
    """The output x of `unit` in the shape that the head wants.

    Feature maps [batch, C, H, W] keep every k-th pixel; channels, as features [batch, C], are padded with zeros: half
    of what is missing before, the rest after. Raises FedpipeError where no such map exists.
    """
    have = tuple(x.shape[1:])
    if have == want:
        return x
    fits = len(have) == len(want) and len(have) in (1, 3) and have[0] <= want[0]
    if not fits or any(h % w for h, w in zip(have[1:], want[1:], strict=True)):
        raise FedpipeError(f"unit {unit}: its output {list(have)} cannot be linked to the head's input {list(want)}")
    before = (want[0] - have[0]) // 2
    after = want[0] - have[0] - before
    if len(have) == 1:
        return F.pad(x, (before, after))
    return F.pad(x[..., :: have[1] // want[1], :: have[2] // want[2]], (0, 0, 0, 0, before, after))
