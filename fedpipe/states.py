"""The folders between rounds: `state/{t}` (states a later row reads) and `own/{t}` (what each client last kept)."""

from pathlib import Path
from typing import Any

from fedpipe import io
from fedpipe.errors import FedpipeError
from fedpipe.messages import finite
from fedpipe.rounds import World
from fedpipe.route import judged, reads
from fedpipe.stopping import Watch
from fedpipe.types import Tensors


class Needs:
    """Which states are needed on, of a route's rows (in order of rounds): `route.needed_states`, for a segment to ask
    in every round without going through all rows again."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.made = {r["out"]: i for i, r in enumerate(rows) if r["kind"] == "mix"}
        self.last_read = {name: r["round"] for r in rows for name in reads(r)}

    def among(self, states: dict[str, Tensors], t: int) -> dict[str, Tensors]:
        """Those of the states there are before round t that rows from it on read, or that stand for the run."""
        made = sorted(states.keys() & self.made.keys(), key=self.made.__getitem__)
        newest = judged({n.split("@")[0]: n for n in made})
        return {n: s for n, s in states.items() if n in newest or self.last_read.get(n, -1) >= t}


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


def read_world(state: Path, own: Path, like: Tensors | None = None) -> tuple[World, int]:
    """The world of two folders, and the round it stands at.

    Raises FedpipeError, naming the file, unless every state is the one its name says, of that round, finite, and has
    the names, shapes and types of `like` (state 0).
    """
    states: dict[str, Tensors] = {}
    rounds = set[int]()
    watch: dict[str, Any] = {}
    for path in _files(state):
        states[path.stem], meta = io.read_tensors(path)
        _check(path, states[path.stem], meta, like)
        rounds.add(meta["round"])
        watch = meta.get("watch", watch)
    if len(rounds) != 1:
        found = f"states of rounds {', '.join(map(str, sorted(rounds)))}" if rounds else "no state"
        raise FedpipeError(f"{state}: {found} in this folder; wanted node@version.safetensors of one round")
    owns: dict[int, tuple[int, Tensors | Path]] = {}
    for path in _files(own):
        client, _, last = path.stem.partition("@")
        if not (client.isdecimal() and last.isdecimal()):
            raise FedpipeError(f"{path}: no name of an own file; wanted client@round.safetensors")
        owns[int(client)] = (int(last), path)
    return World(states, owns, Watch(**watch)), rounds.pop()


def _check(path: Path, tensors: Tensors, meta: dict[str, Any], like: Tensors | None) -> None:
    if meta.get("state") != path.stem or not isinstance(meta.get("round"), int):
        found = f"state {meta.get('state')} of round {meta.get('round')}"
        raise FedpipeError(f"{path}: holds {found}, which is not what its name says")
    if like is not None and (other := sorted(tensors.keys() ^ like.keys())):
        raise FedpipeError(f"{path}: {other[0]} is {'not wanted' if other[0] in tensors else 'missing'}")
    for name, t in tensors.items():
        if like is not None and (t.shape, t.dtype) != (like[name].shape, like[name].dtype):
            found, wanted = (f"{tuple(x.shape)} {x.dtype}" for x in (t, like[name]))
            raise FedpipeError(f"{path}: {name} is {found}, wanted {wanted}")
        if not finite(t):
            raise FedpipeError(f"{path}: {name} holds values that are not finite")


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FedpipeError(f"{folder}: no such folder; the step that writes it has not run")
    return sorted(folder.glob("*.safetensors"))
