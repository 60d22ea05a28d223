"""An environment for each simulator from elsewhere, `.venv/simulators/<name>`, with the versions of `requirements/`."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = tuple(sorted(f.stem for f in (HERE / "requirements").glob("*.txt")))
CPU_TORCH = "https://download.pytorch.org/whl/cpu"  # as in the Makefile: PyPI's own build of torch is for CUDA
VERSIONS = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def folder(name: str) -> Path:
    return ROOT / ".venv/simulators" / name


def python(name: str) -> Path | None:
    """The interpreter of an environment; None where it is not installed as `requirements/` says now."""
    wanted, has = HERE / "requirements" / f"{name}.txt", folder(name) / "requirements.txt"
    if not has.is_file() or has.read_text() != wanted.read_text():
        return None
    return folder(name) / "bin/python"


def install(name: str) -> bool:
    """Make an environment, unless it is there; False, after a line on standard error, where pip cannot."""
    if python(name):
        print(f"{name}: installed")
        return True
    wanted = HERE / "requirements" / f"{name}.txt"
    venv.create(folder(name), clear=True, with_pip=True)
    pip = [str(folder(name) / "bin/python"), "-m", "pip", "install", "-q"]
    index = os.environ.get("TORCH_INDEX", "" if shutil.which("nvidia-smi") else CPU_TORCH)
    torch = [line for line in wanted.read_text().splitlines() if line.startswith("torch==")]
    try:
        if torch:
            extra = ["--extra-index-url", index] if index else []
            subprocess.run([*pip, "--no-deps", "--retries", "0", *extra, *torch], check=True)
        subprocess.run([*pip, "-r", str(wanted)], check=True)
    except subprocess.CalledProcessError:
        print(f"{name}: not installed", file=sys.stderr)
        return False
    shutil.copy(wanted, folder(name) / "requirements.txt")  # last: marks a whole environment
    print(f"{name}: {folder(name).relative_to(ROOT)}", flush=True)
    return True


def versions(interpreter: Path | None, packages: tuple[str, ...]) -> dict[str, str]:
    """Of Python and of those packages an environment has."""
    return json.loads(subprocess.check_output([str(interpreter), "-c", VERSIONS, *packages], text=True))
