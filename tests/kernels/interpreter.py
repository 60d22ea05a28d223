"""Imported first by every test of kernels: on a CPU they run under Triton's interpreter, which has to be asked for
before any of them is defined."""

import os
from collections.abc import Iterator

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a kernel leaves unwritten is seen: `torch.empty` gives NaN, or a number no test expects."""
    empty = torch.empty

    def filled(*args: object, **keywords: object) -> torch.Tensor:
        t = empty(*args, **keywords)  # type: ignore[call-overload]
        return t.fill_(float("nan") if t.is_floating_point() else 1 if t.dtype == torch.bool else 77)

    monkeypatch.setattr(torch, "empty", filled)
    yield
