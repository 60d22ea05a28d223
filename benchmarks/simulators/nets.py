"""Both networks in plain PyTorch, a client's local training and the final evaluation."""

import os
from functools import cache

import torch
from job import BATCH, CLASSES, LR, PARAMETERS, read
from torch import Tensor, nn
from torch.nn import functional as F

DEVICE = torch.device(os.environ.get("SIMULATORS_DEVICE", "cpu"))


@cache
def rows(file: str) -> dict[str, Tensor]:
    """What `job.read` gives, as tensors; read once in a process."""
    torch.set_num_threads(1)
    return {name: torch.from_numpy(array).to(DEVICE) for name, array in read(file).items()}


def net(job: str) -> nn.Module:
    """`cnn`: that of pfl-research's CIFAR-10 benchmark; `tiny`: one linear layer."""
    if job == "tiny":
        layers = [nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES)]
    else:
        layers = [
            *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
            *(nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, CLASSES)),
        ]
    model = nn.Sequential(*layers).to(DEVICE)
    count = sum(p.numel() for p in model.parameters())
    if count != PARAMETERS[job]:
        raise ValueError(f"{job}: {count} parameters, wanted {PARAMETERS[job]}")
    return model


def train(model: nn.Module, x: Tensor, y: Tensor, job: str) -> None:
    """One epoch over a client's rows [50, 3, 32, 32], shuffled, in batches."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR[job])
    for drawn in torch.randperm(len(y)).to(DEVICE).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[drawn]), y[drawn]).backward()
        optimizer.step()


@torch.no_grad()
def loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy on rows, in batches of 100."""
    model.eval()
    parts = [
        F.cross_entropy(model(a), b, reduction="sum").item() for a, b in zip(x.split(100), y.split(100), strict=True)
    ]
    return sum(parts) / len(y)
