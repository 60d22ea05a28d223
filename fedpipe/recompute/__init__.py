"""Backward passes that build again what they need, so that less is saved: parts of a unit, or whole units.

They give what plain autograd gives, alone, around vmap and inside `torch.func`, and change no state twice: what a
forward makes of a buffer is one of its results.
"""

from fedpipe.recompute.parts import Conv, ConvAndShortcut, Linear, Pure
from fedpipe.recompute.policy import Policy
from fedpipe.recompute.rebuilt import Cheap, Last, Pull, rebuilt
from fedpipe.recompute.rerun import again
from fedpipe.recompute.stack import Dims, mapped

__all__ = [
    "Cheap",
    "Conv",
    "ConvAndShortcut",
    "Dims",
    "Last",
    "Linear",
    "Policy",
    "Pull",
    "Pure",
    "again",
    "mapped",
    "rebuilt",
]
