"""Decoded data as training reads it: views of the memory-mapped file."""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedpipe.arrow import numbers
from fedpipe.io import map_arrow, table_meta

RESIDENT = 8 << 30  # bytes of images that a device holds; of more it gets batches


@dataclass(frozen=True)
class Dataset:
    """All rows of a data set. `x` is a view of the file; treat it as read-only."""

    x: torch.Tensor  # uint8 [N, C, H, W]
    y: torch.Tensor  # int64 [N]
    test: NDArray[np.bool_]  # [N]
    shape: tuple[int, int, int]  # C, H, W
    classes: int
    names: tuple[str, ...]  # of the classes
    mean: tuple[float, ...]  # [C], of training rows in 0..1
    std: tuple[float, ...]
    normal: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)
    taken: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)  # bytes of a batch, by its rows

    def batch(self, rows: torch.Tensor, dtype: torch.dtype, into: torch.Tensor | None = None
              ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Normalised images [n, C, H, W] in `dtype` and labels int64 [n] of the given rows int64 [n].

        into: memory for the images; touched a moment ago, it is in the processor's cache.
        """
        scale, shift = self.normalisation(dtype)
        if self.x.device.type == "cpu":
            taken = torch.index_select(self.x, 0, rows, out=self._room(len(rows)))
        else:
            rows = rows.to(self.x.device, non_blocking=True)
            taken = self.x.index_select(0, rows)
        x = taken.to(dtype) if into is None else into.view(taken.shape).copy_(taken)
        return torch.addcmul(shift, x, scale, out=x), self.y.index_select(0, rows)

    def _room(self, count: int) -> torch.Tensor:
        """Bytes of so many images: memory that stays in the processor's cache, and is no client's."""
        if count not in self.taken:
            self.taken[count] = torch.from_numpy(np.empty((count, *self.shape), np.uint8))
        return self.taken[count]

    def on(self, device: torch.device) -> "Dataset":
        """The same, its images and labels in a device's memory where there are not too many: a rule of their size, as
        where images are normalised decides bits."""
        if device.type == "cpu" or self.x.nbytes > RESIDENT:
            return self
        return replace(self, x=self.x.to(device), y=self.y.to(device), normal={}, taken={})

    def normalisation(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift [C, H, W] that take bytes to (byte / 255 - mean) / std; whole images are twice as fast."""
        if dtype in self.normal:
            return self.normal[dtype]
        mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (self.mean, self.std))
        scale, shift = (
            t.to(dtype).expand(self.shape).contiguous().to(self.x.device) for t in (1 / (255 * std), -mean / std)
        )
        return self.normal.setdefault(dtype, (scale, shift))


def load(path: Path) -> Dataset:
    """The data of `data.arrow`, checked against its seal; a process opens a file that does not change once."""
    stat = path.stat() if path.is_file() else None
    return _opened(path, stat and (stat.st_ino, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=2)
def _opened(path: Path, version: tuple[int, ...] | None) -> Dataset:
    table = map_arrow(path).combine_chunks()
    meta = table_meta(table, str(path))
    images = table.column("image").chunk(0).flatten()
    return Dataset(
        # DLPack and not NumPy: Arrow's NumPy views are marked read-only, which a tensor cannot be.
        x=torch.from_dlpack(images).view(table.num_rows, *meta["shape"]),
        y=torch.from_numpy(numbers(table.column("label")).astype(np.int64)),
        test=numbers(table.column("test")),
        shape=tuple(meta["shape"]),
        classes=meta["classes"],
        names=tuple(meta["names"]),
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
    )
