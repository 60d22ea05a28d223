"""Every random draw of a study: `rng(seed, round, client, purpose)`, a counter-based stream, no global state."""

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

_START = np.zeros(4, dtype=np.uint64)  # Philox's counter; numpy copies it


class _Key(ISeedSequence):
    """A ready key in the place of a seed: by `Philox(key=...)` numpy would first ask the system for entropy."""

    def __init__(self, raw: bytes):
        self.raw = raw

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> NDArray[np.uint64]:
        """The two words that Philox asks for."""
        return np.frombuffer(self.raw, "<u8")


def _raw(seed: int, round: int | None, client: int | None, purpose: str) -> bytes:
    text = f"{seed}/{'-' if round is None else round}/{'-' if client is None else client}/{purpose}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def key(seed: int, round: int | None, client: int | None, purpose: str) -> int:
    """The 128-bit Philox key of a draw; `None` for a draw that belongs to no round or no client."""
    return int.from_bytes(_raw(seed, round, client, purpose), "little")


def rng(seed: int, round: int | None = None, client: int | None = None, purpose: str = "") -> np.random.Generator:
    """The generator of one purpose. Equal arguments give equal draws on every machine and in every process."""
    chosen: Any = _Key(_raw(seed, round, client, purpose))  # numpy takes it; its types know only its own sequence
    return np.random.Generator(np.random.Philox(chosen, counter=_START))
