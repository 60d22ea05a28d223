"""Where segments lie among tiles, and which ranks of a sample bracket a threshold: from lengths alone, kept between
calls."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """starts: of segments, and n, int64 [segments + 1]; first: the segment in which a tile begins, int32 [tiles + 1],
    the last one's last; k: int64 [segments]."""

    starts: Tensor
    first: Tensor
    k: Tensor
    tiles: int


@lru_cache(maxsize=16)
def layout(sizes: tuple[int, ...], k: tuple[int, ...], tile: int, device: torch.device) -> Layout:
    """Tables of segments cut into tiles of so many entries."""
    starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    tiles = -(-int(starts[-1]) // tile)
    begins = np.arange(tiles if len(sizes) > 1 else 0, dtype=np.int64) * tile  # one segment: nothing to look up
    first = np.append(np.searchsorted(starts, begins, side="right") - 1, len(sizes) - 1)
    tables = (starts, first.astype(np.int32), np.array(k, dtype=np.int64))
    starts_, first_, k_ = (torch.from_numpy(table).to(device) for table in tables)
    return Layout(starts_, first_, k_, tiles)


@lru_cache(maxsize=16)
def ranks(
    sizes: tuple[int, ...], k: tuple[int, ...], sample: int, programs: int, sigmas: float, device: torch.device
) -> Tensor:
    """Ranks [segments, 2] in a sample of `sample` entries whose values the k-th largest lies between.

    The share of a sample above the k-th largest has the binomial's standard deviation; the median over programs has
    1.25 times that of their mean. One rank more on each side for the rounding. A segment that is sampled whole has one
    rank, the exact one.
    """
    size, count = np.array(sizes, dtype=np.float64), np.array(k, dtype=np.float64)
    p = count / size
    spread = sigmas * np.sqrt(p * (1 - p) / (sample * programs)) * (1.25 if programs > 1 else 1)
    low = np.ceil(sample * (p + spread)) + 1
    high = np.maximum(np.floor(sample * (p - spread)) - 1, 0)
    exact = (size <= sample) | (count == 0)
    both = np.stack((np.where(exact, count, low), np.where(exact, count, high)), axis=-1)
    return torch.from_numpy(both.astype(np.int32)).to(device)
