"""Encoded images to pixels, and what is computed from pixels."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedpipe.errors import FedpipeError

GREY = ("1", "L")
DEEP = ("I", "F")  # and I;16...: more than eight bits


def decode(images: list[Any], size: int | None) -> NDArray[np.uint8]:
    """Pixels [N, C, H, W]: C is 1 when every image is grey, else 3; brought to `size` x `size` (bilinear) if given.

    Raises `FedpipeError` for a file that is no image, for more than eight bits a channel, for unequal sizes.
    """
    pixels = [_pixels(image, size, row) for row, image in enumerate(images)]
    sizes = sorted({p.shape[:2] for p in pixels})
    if len(sizes) > 1:
        (h, w), (h2, w2) = sizes[0], sizes[-1]
        raise FedpipeError(f"data.size: images differ in size ({w}x{h} to {w2}x{h2}); set a side in pixels")
    channels = max(1 if p.ndim == 2 else 3 for p in pixels)
    out = np.empty((len(pixels), channels, *sizes[0]), np.uint8)
    for row, p in enumerate(pixels):
        out[row] = p if p.ndim == 2 else p.transpose(2, 0, 1)
    return out


def _pixels(image: Any, size: int | None, row: int) -> NDArray[np.uint8]:
    """[H, W] of a grey image, [H, W, 3] of any other."""
    try:
        picture = _open(image)
        if picture.mode.startswith(DEEP):
            raise FedpipeError(f"image {row}: mode {picture.mode} has more than 8 bits a channel; wanted grey or RGB")
        picture = picture.convert("L" if picture.mode in GREY else "RGB")
    except (OSError, UnidentifiedImageError) as e:
        raise FedpipeError(f"image {row}: not readable ({' '.join(str(e).split())})") from e
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _open(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    raw = image.as_py()
    if isinstance(raw, dict):
        raw = Path(raw["path"]).read_bytes() if raw["bytes"] is None else raw["bytes"]
    picture = Image.open(io.BytesIO(raw))
    # The angle a camera was held at is part of what `datasets` decodes, too.
    return ImageOps.exif_transpose(picture) if "exif" in picture.info else picture


def moments(pixels: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation [C] of pixels [N, C, H, W], in 0..1.

    Taken from counts of the 256 levels, so that they are exact and the same on every machine. A constant channel has
    deviation 1, which leaves it at 0 once normalised.
    """
    n, channels = pixels.shape[:2]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, n, 1000):
        for c in range(channels):
            counts[c] += np.bincount(pixels[start : start + 1000, c].ravel(), minlength=256)
    levels = np.arange(256) / 255
    mean = counts @ levels / counts.sum(1)
    square = (counts * (levels - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    return mean.tolist(), np.where(square > 0, np.sqrt(square), 1.0).tolist()
