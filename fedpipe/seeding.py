"""The one place where code that can only draw from torch's global generator is given a stream of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block; outside, its stream goes on as if nothing had been drawn.

    For layers that draw by themselves: initialisation, dropout. `seed` may have any number of bits.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed % 2**64)
    try:
        yield
    finally:
        generator.set_state(state)
