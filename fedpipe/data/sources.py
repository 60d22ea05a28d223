"""Where rows come from: the embedded digits, a folder under FEDPIPE_DATA, or the Hugging Face hub.

Images stay encoded here; `decode.py` turns them into pixels once it is known which are wanted.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpipe.config import Data
from fedpipe.errors import FedpipeError

if TYPE_CHECKING:
    import datasets

VARIABLE = "FEDPIPE_DATA"


@dataclass(frozen=True)
class Split:
    """Rows not decoded yet: an image, a label and a client id each."""

    images: list[Any]  # PIL images, or Arrow values that hold encoded bytes or a path
    labels: NDArray[Any]  # int64, or text where the source names no classes
    names: list[str] | None  # of the classes 0, 1, ...; None: the labels' own values
    ids: NDArray[np.str_] | None = None  # natural client ids

    def take(self, rows: NDArray[np.int64]) -> "Split":
        ids = None if self.ids is None else self.ids[rows]
        return replace(self, images=[self.images[i] for i in rows], labels=self.labels[rows], ids=ids)


def read(spec: Data) -> tuple[Split, Split | None, str]:
    """The training split, the test split (None: there is none) and where they come from.

    Raises `FedpipeError` naming what was looked for and where, the columns, or the splits there are.
    """
    if spec.name == "digits":
        return _digits(), None, "scikit-learn digits"
    from fedpipe.data.columns import extract

    with _loaded(spec) as (found, source):
        if spec.train not in found:
            raise FedpipeError(f"data.train: {spec.name} has no split {spec.train!r}; it has {', '.join(found)}")
        train = extract(found[spec.train], spec)
        if spec.test in found:
            return train, extract(found[spec.test], spec), source
    if spec.test not in (None, "test"):
        raise FedpipeError(f"data.test: {spec.name} has no split {spec.test!r}; it has {', '.join(found)}")
    return train, None, source


def _digits() -> Split:
    """1,797 grey images of 8x8 pixels in 17 levels (E. Alpaydin, C. Kaynak, UCI 1998), part of scikit-learn's wheel."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    return Split([Image.fromarray(p) for p in pixels], found.target.astype(np.int64), [str(d) for d in range(10)])


@contextmanager
def _loaded(spec: Data) -> Iterator[tuple[dict[str, "datasets.Dataset"], str]]:
    """The splits of a data set by name; what is only needed for reading them is gone afterwards."""
    import datasets

    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    base = os.environ.get(VARIABLE)
    folder = Path(base) / spec.name if base else None
    try:
        if folder is None or not folder.is_dir():
            yield _hub(spec.name, base), f"Hugging Face hub: {spec.name}"
        elif parquet := _parquet_files(folder):
            yield {split: _parquet(files) for split, files in parquet.items()}, f"{VARIABLE}/{spec.name}, Parquet"
        else:
            with tempfile.TemporaryDirectory() as cache:
                yield _image_folder(folder, cache), f"{VARIABLE}/{spec.name}, image folder"
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def _parquet_files(folder: Path) -> dict[str, list[Path]]:
    """Files of each split: `train.parquet`, or the hub's own `[data/]train-00000-of-00002.parquet`."""
    files: dict[str, list[Path]] = {}
    for file in sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]):
        files.setdefault(re.sub(r"-\d+-of-\d+.*$", "", file.stem), []).append(file)
    return files


def _parquet(files: list[Path]) -> "datasets.Dataset":
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Any fingerprint: without one the whole table is hashed for a cache that is not used.
        return datasets.Dataset(pa.concat_tables([pq.read_table(f) for f in files]), fingerprint=files[0].stem)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise FedpipeError(f"{files[0]}: not readable as Parquet ({' '.join(str(e).split())})") from e


def _image_folder(folder: Path, cache: str) -> dict[str, "datasets.Dataset"]:
    """`<split>/<class>/*.png`, read by the `imagefolder` loader with a cache of its own that is removed."""
    import datasets

    try:
        return dict(datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=cache))
    except Exception as e:
        wanted = "<split>.parquet or <split>/<class>/*.png"
        raise FedpipeError(f"{folder}: no data set; wanted {wanted} ({' '.join(str(e).split())[:200]})") from e


def _hub(name: str, base: str | None) -> dict[str, "datasets.Dataset"]:
    """The splits of a hub data set, through the user's own Hugging Face cache.

    One short question first: an unknown name or an unreachable hub is then known at once, and not after the loader's
    many retries. A data set in the cache is loaded without the question when HF_HUB_OFFLINE is set.
    """
    import datasets
    import huggingface_hub

    looked = f"{VARIABLE}={base}" if base else f"{VARIABLE} is not set"
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(name, timeout=10)
        return dict(datasets.load_dataset(name))
    except Exception as e:
        raise FedpipeError(
            f"data.name: no data set {name!r} ({looked}; Hugging Face hub: {type(e).__name__}); "
            f"name digits or a hub id, or put {name}/train.parquet or {name}/train/<class>/*.png "
            f"in a folder and set {VARIABLE} to it"
        ) from e
