"""Decoded data as training reads it: views of the memory-mapped file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedpipe.io import map_arrow, table_meta


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

    def batch(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images [n, C, H, W] in `dtype` and labels int64 [n] of the given rows int64 [n]."""
        mean, std = (torch.tensor(v, dtype=dtype).view(-1, 1, 1) for v in (self.mean, self.std))
        return self.x[rows].to(dtype).div_(255).sub_(mean).div_(std), self.y[rows]


def load(path: Path) -> Dataset:
    """The data of `data.arrow`, checked against its seal."""
    table = map_arrow(path).combine_chunks()
    meta = table_meta(table, str(path))
    images = table.column("image").chunk(0).flatten()
    return Dataset(
        # DLPack and not NumPy: Arrow's NumPy views are marked read-only, which a tensor cannot be.
        x=torch.from_dlpack(images).view(table.num_rows, *meta["shape"]),
        y=torch.tensor(table.column("label").to_numpy(), dtype=torch.int64),
        test=table.column("test").to_numpy(),
        shape=tuple(meta["shape"]),
        classes=meta["classes"],
        names=tuple(meta["names"]),
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
    )
