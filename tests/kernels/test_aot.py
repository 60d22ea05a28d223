"""Every Triton kernel compiles for the GPUs people have, without one; the streaming ones stream."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedpipe.kernels.common import OPS

SCRIPT = Path(__file__).with_name("aot.py")
# Tritons that builds of torch for CUDA pin, each in a folder of its own beside the environment: `make test-slow`.
OTHERS = Path(sys.prefix) / "tritons"
VERSIONS = ("3.6.0", "3.7.1")


def compiled(sm: int, cache: Path, first: Path | None = None) -> dict[str, dict[str, int]]:
    """What each kernel became, by name; nothing is taken from a cache of earlier runs."""
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = {"PYTHONPATH": str(first)} if first else {}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, str(sm)],
        env={**keep, **path, "TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {row["kernel"]: row for row in map(json.loads, done.stdout.splitlines())}


def judge(found: dict[str, dict[str, int]]) -> None:
    assert {name.split(".")[0] for name in found} == set(OPS)
    for name, made in found.items():
        if made["streaming"]:
            assert made["registers"] <= 64 and made["spills"] == 0, (name, made)
            assert made["wide loads"] or made["wide stores"], (name, made)


@pytest.mark.parametrize("sm", [80, 90])
def test_this_triton(sm: int, tmp_path: Path) -> None:
    judge(compiled(sm, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("version", VERSIONS)
def test_other_tritons(version: str, sm: int, tmp_path: Path) -> None:
    if not (OTHERS / version).is_dir():
        pytest.skip(f"{OTHERS / version}: not installed; `make test-slow` does")
    found = compiled(sm, tmp_path, OTHERS / version)
    assert {made["triton"] for made in found.values()} == {version}
    judge(found)
