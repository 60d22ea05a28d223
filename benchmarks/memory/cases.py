"""The plans of the grid: whole models, FeDepth's blocks, HeteroFL's widths and SCAFFOLD's state, on 3x32x32 images."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle, product
from typing import Any

Block = tuple[int, int]  # first and last unit, counted from 1
Settings = dict[str, Any]

BLOCKS: dict[str, dict[str, list[Block]]] = {
    "preresnet20": {  # FeDepth's, by the share of the budget; lack: the client never trains the first three
        "1/6": [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 9)],
        "1/3": [(1, 2), (3, 4), (5, 9)],
        "1/2": [(1, 3), (4, 9)],
        "1": [(1, 9)],
        "lack": [(4, 4), (5, 5), (6, 6), (7, 8), (9, 9)],
    },
    "vit_tiny": {f"of {n}": [(k, k + n - 1) for k in range(1, 13, n)] for n in (2, 4, 6, 12)},
    "mobilenet": {"of 4 and 5": [(1, 4), (5, 9), (10, 13)]},
    "cnn4": {"of 1": [(1, 1), (2, 2), (3, 3)]},
}
WIDTHS = {"preresnet20": (0.5, 0.33, 0.25, 0.165), "mobilenet": (0.5, 0.25), "cnn4": (0.5, 0.25)}
AGAIN: dict[str, Settings] = {  # the highest level of every unit, or ranges where units have no levels
    "preresnet20": {"levels": {"b*": 1}},
    "vit_tiny": {"levels": {"b*": 2}},
    "mobilenet": {"again": [("b1", "b4"), ("b5", "b9"), ("b10", "b13")]},
    "cnn4": {"again": [("b1", "b1"), ("b2", "b3")]},
}
OTHER: dict[str, Settings] = {  # other ways, for whole models
    "preresnet20": {"again": [("b1", "b3"), ("b4", "b6"), ("b7", "b9")]},
    "vit_tiny": {"levels": {"b*": 1}},
}
OPTIMIZERS: dict[str, Settings] = {
    "sgd": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"name": "adamw", "lr": 0.001, "weight_decay": 0.01},
}
BATCHES = (16, 64, 128)


@dataclass(frozen=True)
class Case:
    """One plan of one study. `blocks` are FeDepth's; `recompute` are keys of the study's `local`, `settings` the
    network's own."""

    network: str
    plan: str
    method: str | Settings = "fedavg"
    blocks: tuple[Block, ...] = ()
    batch: int = 16
    optimizer: str = "sgd"
    recompute: Settings = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)

    @property
    def study(self) -> Settings:
        return {
            "name": "memory",
            "data": {"name": "digits", "partition": {"kind": "iid", "clients": 10}},
            "model": {"name": self.network, **self.settings},
            "methods": [self.method],
            "rounds": 1,
            "local": {"batch": self.batch, "optimizer": OPTIMIZERS[self.optimizer], **self.recompute},
        }

    @property
    def about(self) -> Settings:
        again = " ".join(f"{k} {v}" for k, v in self.recompute.items()) or "off"
        return {"network": self.network, "plan": self.plan, "batch": self.batch, "optimizer": self.optimizer} | {
            "recompute": again
        }

    @property
    def trained(self) -> list[str]:
        """The units of each phase."""
        return [f"{a}-{b}" if a < b else f"{a}" for a, b in self.blocks] or ["all"]


def fedepth(network: str, name: str, blocks: list[Block], **more: Any) -> Case:
    return Case(network, f"fedepth {name}", "fedepth", tuple(blocks), **more)


def heterofl(network: str, width: float, **more: Any) -> Case:
    return Case(network, f"heterofl {width}", {"heterofl": {"widths": [width]}}, **more)


def plans(network: str) -> list[Case]:
    """Every plan of a network, without its variations. ViT-Tiny has no widths, and its block of 12 is FedAvg's plan."""
    made = [fedepth(network, name, blocks) for name, blocks in BLOCKS[network].items()]
    if network == "vit_tiny":
        return made
    slim = [heterofl(network, width) for width in WIDTHS[network]]
    return [*made, Case(network, "fedavg"), Case(network, "scaffold", "scaffold"), *slim]


def grid() -> Iterator[Case]:
    """Each plan with every batch and optimizer, with recomputation and without; small batches first."""
    for batch, network in product(BATCHES, BLOCKS):
        cases = [replace(p, recompute=r) for p in plans(network) for r in ({}, AGAIN[network])]
        if network in OTHER:
            cases.append(Case(network, "fedavg", recompute=OTHER[network]))
        yield from (replace(c, batch=batch, optimizer=o) for c in cases for o in OPTIMIZERS)


def quick() -> list[Case]:
    """Seconds of the grid: each plan once with the smallest batch, its optimizer and recomputation in turn."""
    slow = ("fedepth of 2", "fedepth of 4", "fedepth of 12")
    turns = cycle(product((True, False), OPTIMIZERS))
    cases = [p for network in BLOCKS for p in plans(network) if p.plan not in slow]
    return [
        replace(c, batch=BATCHES[0], optimizer=o, recompute=AGAIN[c.network] if again else {})
        for c, (again, o) in zip(cases, turns, strict=False)
    ]
