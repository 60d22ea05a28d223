"""What tests share: one thread per process, a study small enough for a unit test, and who is skipped where."""

import os

# Tiny tensors on shared cores: more threads only wait for each other. Set before anything imports torch.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpipe.config import Study

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a GPU the tests of kernels run on it, and so only with the others that need one."""
    import torch

    for item in items:
        if item.path.parent.name == "kernels" and item.path.name != "test_aot.py" and torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("real_data") and not os.environ.get("FEDPIPE_DATA"):
        pytest.skip("FEDPIPE_DATA is not set: no folder of real data sets at hand")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture
def real_data() -> Path:
    """The folder FEDPIPE_DATA; the test that asks for it carries the mark `real_data`."""
    return Path(os.environ["FEDPIPE_DATA"])


TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "rows": 240, "partition": {"kind": "dirichlet", "alpha": 1.0, "clients": 6}},
    "model": {"name": "mlp"},
    "methods": ["fedavg"],
    "rounds": 2,
    "cohort": 3,
    "local": {"epochs": 1, "batch": 16, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
}


@pytest.fixture
def tiny_study() -> Callable[..., Study]:
    """`tiny_study(rounds=3, ...)`: an MLP on a few digits, six clients, three a round; keywords replace its keys."""
    return lambda **keys: Study.model_validate({**TINY, **keys})


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One results folder for all studies of a test process: content names keep them apart, data is decoded once."""
    return tmp_path_factory.mktemp("results")
