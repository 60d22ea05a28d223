"""Clients' batches, from a data set on the device that trains."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpipe.data.dataset import Dataset
from fedpipe.types import Batch, Tensors


class Feed:
    """Rows of a data set as batches of one client or a stack. loss: whose classes count in it (`local.loss`)."""

    def __init__(self, loss: str, data: Dataset, device: torch.device, dtype: torch.dtype):
        self.loss, self.data, self.device, self.dtype = loss, data, device, dtype
        self.resident = data.on(device)
        self.resident.normalisation(dtype)  # now, and not when a client's peak is measured
        self._weights: dict[tuple[int, int], Tensor] = {}

    def always(self, rows: Tensor) -> Tensors:
        """What every batch of a client with these rows [n] has besides them."""
        return {"classes": self.labels(rows).to(self.device)} if self.loss == "masked_client" else {}

    def labels(self, rows: Tensor) -> Tensor:
        """Which classes [classes] are among rows [n]."""
        found = torch.zeros(self.data.classes, dtype=torch.bool)
        found[self.data.y[rows]] = True
        return found

    def load(self, rows: NDArray[np.int64], size: int) -> Batch:
        """Rows as a batch: x, y and weights that sum to 1; padded to `size` with rows of weight 0."""
        return {k: t[0] for k, t in self.load_stack([rows], size).items()}

    def load_stack(self, rows: list[NDArray[np.int64]], size: int, into: Tensor | None = None) -> Batch:
        """Batches of the clients of a stack, with a client axis in front; into: an x of their shape to write over."""
        clients, counts = len(rows), [len(r) for r in rows]
        if counts == [size] * clients:
            every, w = np.concatenate(rows), self._even(clients, size)
        else:
            every = np.concatenate([np.pad(r, (0, size - n), mode="edge") for r, n in zip(rows, counts, strict=True)])
            w = torch.zeros(clients, size, dtype=self.dtype)
            for mine, n in zip(w, counts, strict=True):
                mine[:n] = 1 / n
        x, y = self.resident.batch(torch.from_numpy(every), self.dtype, into if self.device.type == "cpu" else None)
        batch = {"x": x.view(clients, size, *x.shape[1:]), "y": y.view(clients, size), "w": w}
        return (
            batch if self.device.type == "cpu" else {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        )

    def _even(self, clients: int, size: int) -> Tensor:
        """Weights of full batches, which nobody writes to."""
        key = (clients, size)
        if key not in self._weights:
            self._weights[key] = torch.from_numpy(np.full(key, 1 / size)).to(self.dtype).to(self.device)
        return self._weights[key]
