"""Where segments lie among tiles, and which ranks of a sample bracket a threshold: from lengths alone, kept between
calls."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

ROOM = 4096  # candidates of a segment at least, if it has so many entries
PROGRAMS = 256  # at most, that sample one segment


@dataclass(frozen=True)
class Layout:
    """starts: of segments, and n, int64 [segments + 1]; first: the segment in which a tile begins, int32 [tiles + 1],
    the last one's last; k: int64 [segments]; rooms: where the candidates of a segment begin, and their number in a row,
    int64 [segments + 1]."""

    starts: Tensor
    first: Tensor
    k: Tensor
    rooms: Tensor
    tiles: int
    room: int


@lru_cache(maxsize=16)
def layout(sizes: tuple[int, ...], k: tuple[int, ...], tile: int, most: int, device: torch.device) -> Layout:
    """Tables of segments cut into tiles of so many entries, with room for about `most` candidates, or ROOM a segment.

    Segments have room for at most a quarter of their entries beyond that."""
    starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    tiles = -(-int(starts[-1]) // tile)
    begins = np.arange(tiles if len(sizes) > 1 else 0, dtype=np.int64) * tile  # one segment: nothing to look up
    first = np.append(np.searchsorted(starts, begins, side="right") - 1, len(sizes) - 1)
    size = np.array(sizes, dtype=np.int64)
    room = np.minimum(size, np.maximum(ROOM, (size * min(0.25, most / size.sum())).astype(np.int64)))
    rooms = np.concatenate(([0], np.cumsum(room)))
    tables = (starts, first.astype(np.int32), np.array(k, dtype=np.int64), rooms)
    starts_, first_, k_, rooms_ = (torch.from_numpy(table).to(device) for table in tables)
    return Layout(starts_, first_, k_, rooms_, tiles, int(rooms[-1]))


@lru_cache(maxsize=16)
def samples(sizes: tuple[int, ...], k: tuple[int, ...], room: int, most: int) -> tuple[int, int, float]:
    """Entries that a program samples, at most `most`; programs of a segment; the largest share of a segment's entries
    that is then expected to stay undecided.

    That is c / sqrt(samples), eight standard deviations (see `ranks`). It is chosen so that sampling and settling are
    fastest together, and that 1.6 times as many candidates have room."""
    size, count = np.array(sizes, dtype=np.float64), np.array(k, dtype=np.float64)
    p = count / size
    c = 8 * size * np.sqrt(p * (1 - p))
    rooms = np.maximum(ROOM, size * min(0.25, room / size.sum()))
    m = min(most, max(128, 1 << (max(sizes) - 1).bit_length()))
    programs = min(PROGRAMS, 1 + int(np.maximum((0.75 * c) ** (2 / 3), (1.6 * c / rooms) ** 2).max()) // m)
    return m, programs, float((c / size).max()) / (m * programs) ** 0.5


@lru_cache(maxsize=16)
def ranks(
    sizes: tuple[int, ...], k: tuple[int, ...], sample: int, programs: int, sigmas: float, device: torch.device
) -> Tensor:
    """Ranks [segments, 2] in a sample of `sample` entries whose values the k-th largest lies between.

    The share of a sample above the k-th largest has the binomial's standard deviation. One rank more on each side for
    the rounding. A segment that is sampled whole has one rank, the exact one.
    """
    size, count = np.array(sizes, dtype=np.float64), np.array(k, dtype=np.float64)
    p = count / size
    spread = sigmas * np.sqrt(p * (1 - p) / (sample * programs))
    low = np.ceil(sample * (p + spread)) + 1
    high = np.maximum(np.floor(sample * (p - spread)) - 1, 0)
    exact = (size <= sample) | (count == 0)
    both = np.stack((np.where(exact, count, low), np.where(exact, count, high)), axis=-1)
    return torch.from_numpy(both.astype(np.int32)).to(device)
