"""Pretrained weights: first values of a model from a safetensors file, a state of another study or anybody's.

A head whose `renamed(found)` gives the tensors of a file that names them in another way opens such files to its model.
"""

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedpipe.config import Study
from fedpipe.errors import FedpipeError
from fedpipe.types import Tensors

if TYPE_CHECKING:
    from fedpipe.models.chain import Chain

FILE = "model.safetensors"  # of a model on the hub
WANTED = "a safetensors file, a folder results/<study> of one run, or a hub id <org>/<name>"
_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)")
_STATE = re.compile(r"state/(\d+)/server@(\d+)\.safetensors")


def located(named: str | Path) -> Path:
    """The file that `model.weights` names: itself, the last state of a study's folder, or a hub model's.

    The hub is asked for an id that neither is a file or folder here nor lies in its cache. Raises FedpipeError naming
    what was looked for.
    """
    path = Path(named)
    if path.is_dir():
        return _last_state(path)
    if path.is_file():
        return path
    if _HUB.fullmatch(path.as_posix()):
        return _downloaded(path.as_posix())
    raise FedpipeError(f"model.weights: no file {path}; wanted {WANTED}")


def _last_state(folder: Path) -> Path:
    """The state a study of one run ended with. FedpipeError for other numbers of runs, and a run that has not ended."""
    spec = folder / "study.json"  # runs of the study as it was before may lie there, too
    known = {r.id for r in Study.model_validate_json(spec.read_bytes()).runs()} if spec.is_file() else None
    runs = [p for p in folder.glob("runs/*") if p.is_dir() and (known is None or p.name in known)]
    if len(runs) != 1:
        wanted = "one run, or the path of a runs/<id>/state/<round>/server@<round>.safetensors in it"
        raise FedpipeError(f"model.weights: {folder}: {len(runs)} runs in this folder; wanted {wanted}")
    found = {p: _STATE.fullmatch(p.relative_to(runs[0]).as_posix()) for p in runs[0].glob("state/*/server@*")}
    states = {(int(m[1]), int(m[2])): p for p, m in found.items() if m}
    if not states or not (runs[0] / "metrics.parquet").is_file():
        raise FedpipeError(f"model.weights: {runs[0]}: it has not ended, or has no state of a server")
    return states[max(states)]


@cache
def _downloaded(name: str) -> Path:
    """A hub model's file in the user's own Hugging Face cache.

    One that lies there is taken without a question, so that all jobs of a study begin with the same. Else one short
    question first: an unknown name or an unreachable hub is then known at once, and not after many retries.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        held = hub.try_to_load_from_cache(name, FILE)
        if isinstance(held, str):
            return Path(held)
        if not offline:
            hub.HfApi().model_info(name, timeout=10)
        return Path(hub.hf_hub_download(name, FILE))
    except Exception as e:
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else type(e).__name__
        raise FedpipeError(
            f"model.weights: no file or folder {name}, and no {FILE} of {name!r} on the Hugging Face hub ({why}); "
            f"wanted {WANTED}"
        ) from e


def taken(model: Tensors, chain: "Chain", named: str | Path) -> Tensors:
    """`model/*` [as `chain` has it], with the values of the file's tensors of these names, with or without `model/`.

    Heads and exits may be absent there, or for another number of classes: these stay as they are; of the head of a file
    with other names (`renamed`) only the classifier may. Raises FedpipeError for what `located` does not find or is no
    safetensors, and for any other tensor that is absent or of another shape.
    """
    path = located(named)
    found, free = _read(path, chain)
    out: Tensors = {}
    for name, t in model.items():
        bare = name.removeprefix("model/")
        new = found.get(bare)
        if new is not None and new.shape == t.shape:
            out[name] = new.to(t.dtype)
        elif bare.startswith(free):
            out[name] = t
        elif new is None:
            raise FedpipeError(f"model.weights: {path}: no tensor {bare}; wanted all of the network's but its heads'")
        else:
            shapes = f"{list(new.shape)}, wanted {list(t.shape)}"
            raise FedpipeError(f"model.weights: {path}: {bare} has shape {shapes}")
    return out


def _read(path: Path, chain: "Chain") -> tuple[Tensors, tuple[str, ...]]:
    """The tensors of a file by the chain's names, and what the names of those begin with that may stay as they are."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = {n.removeprefix("model/"): t for n, t in load_file(path).items()}
    except (OSError, SafetensorError) as e:
        raise FedpipeError(f"model.weights: {path}: {e}; wanted a safetensors file") from e
    last = chain.names[-1]
    head = chain.get_submodule(last)
    renamed = getattr(head, "renamed", None)
    free = [f"{h}." for h in chain.heads.values()]
    if renamed is None or any(n in found for n in chain.tensor_names):
        return found, (*free, f"{last}.")
    classifiers = [f"{last}.{n}." for n, m in head.named_modules() if hasattr(m, "out_features")]
    return renamed(found), (*free, *classifiers)
