"""Every random draw of a study: `rng(seed, round, client, purpose)`, a counter-based stream, no global state."""

import hashlib

import numpy as np


def key(seed: int, round: int | None, client: int | None, purpose: str) -> int:
    """The 128-bit Philox key of a draw; `None` for a draw that belongs to no round or no client."""
    text = f"{seed}/{'-' if round is None else round}/{'-' if client is None else client}/{purpose}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def rng(seed: int, round: int | None = None, client: int | None = None, purpose: str = "") -> np.random.Generator:
    """The generator of one purpose. Equal arguments give equal draws on every machine and in every process."""
    return np.random.Generator(np.random.Philox(key=key(seed, round, client, purpose)))
