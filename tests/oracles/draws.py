"""The draws an oracle shares with the engine, by the engine's own generator: who takes part, and the order of rows."""

import torch
from torch import Tensor

from fedpipe.rng import rng


def cohort(seed: int, round: int, clients: int, size: int) -> list[int]:
    """Clients of a round, drawn without replacement, ascending."""
    return sorted(rng(seed, round, None, "cohort").choice(clients, size, replace=False).tolist())


def bases(seed: int, round: int, client: int, count: int, most: int) -> list[int]:
    """Split-Mix: the base whose turn it is for a client in a round, then others at random."""
    turn = int(rng(seed, None, None, "bases").permutation(count)[(round + client) % count])
    others = [int(b) for b in rng(seed, round, client, "bases").permutation(count) if b != turn]
    return [turn, *others][:most]


def batches(seed: int, round: int, client: int, rows: Tensor, size: int, epochs: int, phase: int = 0,
            role: str = "train") -> list[Tensor]:  # fmt: skip
    """Rows of each local step: per epoch one permutation of the client's rows [n], cut into `size`, the rest last."""
    generator = rng(seed, round, client, f"{role}/batches/{phase}")
    out = []
    for _ in range(epochs):
        order = rows[torch.from_numpy(generator.permutation(len(rows)))]
        out += [order[i : i + size] for i in range(0, len(order), size)]
    return out
