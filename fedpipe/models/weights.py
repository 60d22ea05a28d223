"""Pretrained weights: first values of a model from a safetensors file, a state of another study or anybody's."""

from pathlib import Path

from fedpipe.errors import FedpipeError
from fedpipe.models.chain import Chain
from fedpipe.types import Tensors


def taken(model: Tensors, chain: Chain, path: Path) -> Tensors:
    """`model/*` [as `chain` has it], with the values of the file's tensors of these names, with or without `model/`.

    Heads and exits may be absent there, or for another number of classes: these stay as they are. Raises FedpipeError
    for a file that is missing or no safetensors, and for any other tensor that is absent or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as e:
        raise FedpipeError(f"model.weights: {path}: {e}; wanted a safetensors file") from e
    free = {chain.names[-1], *chain.heads.values()}
    out: Tensors = {}
    for name, t in model.items():
        bare = name.removeprefix("model/")
        new = found.get(name, found.get(bare))
        if new is not None and new.shape == t.shape:
            out[name] = new.to(t.dtype)
        elif bare.split(".")[0] in free:
            out[name] = t
        elif new is None:
            raise FedpipeError(f"model.weights: {path}: no tensor {bare}; wanted all of the network's but its heads'")
        else:
            shapes = f"{list(new.shape)}, wanted {list(t.shape)}"
            raise FedpipeError(f"model.weights: {path}: {bare} has shape {shapes}")
    return out
