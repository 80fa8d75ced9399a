"""What every metric asks of its pictures, and how pictures are brought to a network's size.

A picture is float [H,W,3] in [0,1]. Bytes are refused rather than guessed at: a figure of pictures in [0,255] looks
like a figure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import NumericsError
from ..numerics.arrays import Array

Images = Array
ROUNDING = 1e-4  # how far a resampled picture may leave [0,1]


def checked(images: Images, metric: str) -> Images:
    """A batch [B,H,W,3] of finite values in [0,1], as it came; NumericsError otherwise."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise NumericsError(f"{metric}: expected pictures [B,H,W,3], found {images.shape}")
    if not np.issubdtype(images.dtype, np.floating):
        raise NumericsError(
            f"{metric}: expected floating-point pictures in [0,1], found {images.dtype}; divide bytes by 255"
        )
    low, high = float(images.min()), float(images.max())  # NaN where any value is
    if not np.isfinite([low, high]).all():
        raise NumericsError(f"{metric}: a picture holds NaN or infinite values")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise NumericsError(f"{metric}: expected pictures in [0,1], found values from {low:.4g} to {high:.4g}")
    return images


def checked_pair(images: Images, reference: Images, metric: str) -> tuple[Images, Images]:
    """Two batches of equal shape [B,H,W,3], both ``checked``."""
    images, reference = np.asarray(images), np.asarray(reference)
    if images.shape != reference.shape:
        raise NumericsError(
            f"{metric}: expected two batches of equal shape, found {images.shape} and {reference.shape}"
        )
    return checked(images, metric), checked(reference, metric)


def resized(image: Images, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A picture [H,W,3] as float32 [*size,3] by Pillow's bicubic filter, a channel at a time and never rounded to
    bytes.

    The filter antialiases, unlike those of the deep-learning frameworks. Source: clean-fid, arXiv 2104.11222, section
    3.
    """
    height, width = size
    channels = [
        Image.fromarray(np.ascontiguousarray(image[..., c], dtype=np.float32)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for c in range(image.shape[-1])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def eight_bits(image: Images) -> Image.Image:
    """A picture [H,W,3] in [0,1] as a file would hold it."""
    return Image.fromarray(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8))


def shortest_side(image: Image.Image, side: int) -> Image.Image:
    """OpenAI's way: the shorter side becomes ``side`` by Pillow's bicubic filter, then the centre is cut out."""
    width, height = image.size
    short = min(width, height)
    # int, not round: as torchvision has it
    image = image.resize((side * width // short, side * height // short), Image.Resampling.BICUBIC)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def largest_square(image: Image.Image, side: int) -> Image.Image:
    """CMMD's way: the centre square is cut out, then resized by Pillow's bicubic filter."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)
