"""The folders between rounds: `state/{t}` (states a later row reads) and `own/{t}` (what each client last kept)."""

from pathlib import Path
from typing import Any

from fedpipe import io
from fedpipe.errors import FedpipeError
from fedpipe.rounds import World
from fedpipe.types import Tensors


def write_states(folder: Path, states: dict[str, Tensors], round: int, meta: dict[str, Any]) -> None:
    """One safetensors file per state, `node@version.safetensors`."""
    with io.new_folder(folder) as f:
        for name, tensors in states.items():
            io.write_tensors(f / f"{name}.safetensors", tensors, {**meta, "state": name, "round": round})


def write_owns(folder: Path, owns: dict[int, tuple[int, Tensors | Path]], meta: dict[str, Any]) -> None:
    """One file per client that keeps something, `client@round.safetensors`; unchanged ones are linked forward."""
    with io.new_folder(folder) as f:
        for client, (last, kept) in sorted(owns.items()):
            target = f / f"{client}@{last}.safetensors"
            if isinstance(kept, Path):
                io.link(kept, target)
            else:
                io.write_tensors(target, kept, {"client": client, "round": last})


def read_world(state: Path, own: Path) -> tuple[World, int]:
    """The world of two folders, and the round it stands at."""
    states: dict[str, Tensors] = {}
    round = 0
    for path in _files(state):
        tensors, meta = io.read_tensors(path)
        states[path.stem], round = tensors, meta["round"]
    if not states:
        raise FedpipeError(f"{state}: no state in this folder; wanted node@version.safetensors")
    owns: dict[int, tuple[int, Tensors | Path]] = {}
    for path in _files(own):
        client, last = path.stem.split("@")
        owns[int(client)] = (int(last), path)
    return World(states, owns), round


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FedpipeError(f"{folder}: no such folder; the step that writes it has not run")
    return sorted(folder.glob("*.safetensors"))
