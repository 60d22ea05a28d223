"""The machine a job runs on: its threads, and the platform on which equal bytes are promised."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from fedpipe.allocator import keep_freed
from fedpipe.config import Run
from fedpipe.errors import FedpipeError


def device(run: Run) -> str:
    """`cuda` or `cpu`: what the study asks for, or what is there."""
    import torch

    if run.device == "cuda" and not torch.cuda.is_available():
        raise FedpipeError("device: the study wants cuda, this machine has none")
    return run.device if run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def prepare(run: Run) -> None:
    """Set what changes bits (threads, deterministic algorithms), and the allocator, which changes none."""
    import torch

    keep_freed()
    torch.set_num_threads(run.threads)
    if device(run) == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.precision == "tf32"
    elif run.precision == "tf32":
        raise FedpipeError("precision: tf32 is what CUDA devices have; this study runs on a CPU")


def describe(run: Run) -> str:
    """One line naming everything that decides bits: torch, device, CPU capability, threads, precision."""
    import torch

    kind = device(run)
    what = torch.cuda.get_device_name() if kind == "cuda" else torch.backends.cpu.get_cpu_capability()
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "default")
    versions = f"torch {torch.__version__}, numpy {np.__version__}"
    kernels = f", liger {_liger()}" if kind == "cuda" else ""
    how = f"threads {run.threads}, {run.precision}{', compiled' if run.compile else ''}"
    return f"{versions}, {kind} {what}{kernels}, onednn {isa}, {how}"


def _liger() -> str:
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return "none"


def host() -> str:
    """What decides bits as far as it is known without torch: keeps apart, in a cache, what other machines have made."""
    kinds = [k for k in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve") if k in _flags()]
    versions = " ".join(f"{p} {version(p)}" for p in ("torch", "numpy"))
    cuda = f", cuda, liger {_liger()}" if Path("/dev/nvidia0").exists() else ""
    return f"{versions}, {platform.machine()} {' '.join(kinds)}{cuda}"


def _flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # no Linux
        return set()


def check(run: Run, recorded: str) -> None:
    """Refuse to go on with states made on another platform, unless the study says `platform: any`."""
    here = describe(run)
    if recorded != here and run.platform != "any":
        raise FedpipeError(
            f"platform: state 0 was made on [{recorded}], this job runs on [{here}]; other bits would result "
            "(set platform: any to go on, marked in the table)"
        )
