"""The two jobs as every simulator gets them: 100 clients of 50 images, 10 a round, one epoch of batch 10, plain SGD.

python job.py FOLDER    # makes the rows
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

CLIENTS, ROWS, COHORT, BATCH, CLASSES = 100, 50, 10, 10, 10
TEST = 5  # test rows a client
LR = {"cnn": 0.05, "tiny": 0.001}
PARAMETERS = {"cnn": 1_626_442, "tiny": 30_730}
SHAPE = (3, 32, 32)


def images(rng: np.random.Generator, templates: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A coarse pattern of the class under much noise, uint8 [n, 3, 32, 32]."""
    noise = rng.normal(0, 60, (len(labels), *SHAPE))
    return np.clip(128 + templates[labels] + noise, 0, 255).astype(np.uint8)


def make(folder: Path) -> None:
    """Write the rows once as `simulators/{train,test}.parquet` (PNG, for fedpipe) and as `rows.npz` for the others.

    A fifth of the labels is drawn anew, so that no network fits them all: once a loss has vanished, gradients are so
    small that a CPU computes with them at another speed.
    """
    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 20, (CLASSES, 3, 8, 8))
    templates = coarse.repeat(4, axis=2).repeat(4, axis=3)
    arrays: dict[str, Any] = {}
    for split, rows in (("train", ROWS), ("test", TEST)):
        labels = rng.integers(0, CLASSES, CLIENTS * rows)
        arrays[f"{split}_x"] = images(rng, templates, labels)
        anew = rng.random(len(labels)) < 0.2
        arrays[f"{split}_y"] = np.where(anew, rng.integers(0, CLASSES, len(labels)), labels)
        _parquet(folder / "simulators" / f"{split}.parquet", arrays[f"{split}_x"], arrays[f"{split}_y"], rows)
    np.savez(folder / "rows.npz", **arrays)


def _parquet(file: Path, x: np.ndarray, y: np.ndarray, rows: int) -> None:
    """Rows `client * rows` to `(client + 1) * rows` belong to a client; images in Hugging Face's struct of bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def png(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    file.parent.mkdir(parents=True, exist_ok=True)
    encoded = [{"bytes": png(image), "path": None} for image in x]
    client = [str(k // rows) for k in range(len(y))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(encoded, kind), "label": y, "client": client}), file)


def read(file: str) -> dict[str, np.ndarray]:
    """Normalised float32 `x` [clients, rows, 3, 32, 32], int64 `y` [clients, rows], and `test_x`, `test_y`."""
    found = dict(np.load(file))
    pixels = found["train_x"] / 255.0
    mean, std = (f((0, 2, 3), keepdims=True).astype(np.float32) for f in (pixels.mean, pixels.std))
    x, test = ((found[k].astype(np.float32) / 255 - mean) / std for k in ("train_x", "test_x"))
    return {
        "x": x.reshape(CLIENTS, ROWS, *SHAPE),
        "y": found["train_y"].reshape(CLIENTS, ROWS),
        "test_x": test,
        "test_y": found["test_y"],
    }


def arguments() -> tuple[str, str, int]:
    """`python X.py JOB DATA ROUNDS`"""
    job, data, rounds = sys.argv[1:]
    return job, data, int(rounds)


def report(loss: float) -> None:
    """The runner's last line: loss of the final model on the test rows."""
    print(json.dumps({"loss": loss}), flush=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
