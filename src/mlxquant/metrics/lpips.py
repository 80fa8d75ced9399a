"""LPIPS v0.1 (arXiv 1801.03924, eq. 1): how differently a trained network sees two pictures, 0 for identical ones.

Five layers of AlexNet or VGG-16 are compared: features scaled to unit length at every pixel, squared differences
weighted by learned heads, averaged over the picture and summed. AlexNet is what the literature on quantization reports.
Parameters have the names of the ``lpips`` package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, NumericsError
from ..numerics.convolution import convolved
from .images import Images, checked_pair
from .weights import Tensors, Weights, fitted, read_tensors

PIXELS = 2**18  # of the pairs that go through the network at once, which bounds the memory; at least one pair does
EPSILON = 1e-10
SHIFT = np.array([-0.030, -0.088, -0.188], dtype=np.float32)  # of pictures in [-1,1]
SCALE = np.array([0.458, 0.448, 0.450], dtype=np.float32)


@dataclass(frozen=True)
class TrunkLayer:
    """A convolution and its rectifier; ``name`` is the layer's number in torchvision's ``features``."""

    name: int
    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class Trunk:
    """Slices of convolutions; before every slice but the first, a maximum over ``pool`` pixels at a stride of 2, where
    it is not 0.
    """

    weights: Weights
    heads: str  # sha256 of the published heads, first to last, as float32
    slices: tuple[tuple[TrunkLayer, ...], ...]
    pool: tuple[int, ...]
    smallest: int  # pixels of a picture's side that leave something for the last slice


def _vgg(first: int, inputs: int, outputs: int, count: int) -> tuple[TrunkLayer, ...]:
    return tuple(TrunkLayer(first + 2 * i, inputs if i == 0 else outputs, outputs) for i in range(count))


_LICENCE = "BSD-3-Clause (torchvision) and BSD-2-Clause (heads)"
_REPOSITORY = "achiru/DiffSynth-Studio-ImageMetrics"

ALEX = Trunk(
    Weights("AlexNet", _REPOSITORY, ("LPIPS/alexnet.safetensors",), _LICENCE),
    "718a8b40b0d22f96192d34ab93c0db5c7943558ff6c2407f44812dce2f29b5f4",
    (
        (TrunkLayer(0, 3, 64, 11, 4, 2),),
        (TrunkLayer(3, 64, 192, 5, 1, 2),),
        (TrunkLayer(6, 192, 384),),
        (TrunkLayer(8, 384, 256),),
        (TrunkLayer(10, 256, 256),),
    ),
    (0, 3, 3, 0, 0),
    31,
)
VGG = Trunk(
    Weights("VGG-16", _REPOSITORY, ("LPIPS/vgg.safetensors",), _LICENCE),
    "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78",
    (_vgg(0, 3, 64, 2), _vgg(5, 64, 128, 2), _vgg(10, 128, 256, 3), _vgg(17, 256, 512, 3), _vgg(24, 512, 512, 3)),
    (0, 2, 2, 2, 2),
    16,
)


def shapes(trunk: Trunk) -> dict[str, tuple[int, ...]]:
    """Name to shape of every parameter, in PyTorch's layout."""
    found: dict[str, tuple[int, ...]] = {}
    for index, convolutions in enumerate(trunk.slices):
        for c in convolutions:
            found[f"net.slice{index + 1}.{c.name}.weight"] = (c.outputs, c.inputs, c.kernel, c.kernel)
            found[f"net.slice{index + 1}.{c.name}.bias"] = (c.outputs,)
        found[f"lin{index}.model.1.weight"] = (1, convolutions[-1].outputs, 1, 1)
    return found


class Lpips:
    """Scores pairs of pictures; a value a pair, lower is closer."""

    def __init__(self, trunk: Trunk, arrays: Tensors, source: str):
        """``arrays`` under the names of ``shapes``; ArtifactError, naming ``source``, where they do not fit."""
        self._trunk = trunk
        weights = fitted(arrays, shapes(trunk), source)
        self._weights = {
            name: value.transpose(0, 2, 3, 1) if value.ndim == 4 else value for name, value in weights.items()
        }

    def _features(self, images: Images) -> Iterator[mx.array]:
        """What the slices write, [B,h,w,C], at unit length, for pictures [B,H,W,3] in [0,1]."""
        x = (mx.array(images.astype(np.float32)) * 2 - 1 - mx.array(SHIFT)) / mx.array(SCALE)
        for index, convolutions in enumerate(self._trunk.slices):
            if size := self._trunk.pool[index]:
                x = nn.MaxPool2d(size, 2)(x)
            for c in convolutions:
                name = f"net.slice{index + 1}.{c.name}"
                weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
                x = convolved(x, weight, bias, c.stride, (c.padding, c.padding), rectify=True)
            yield x / (mx.sqrt((x * x).sum(axis=-1, keepdims=True)) + EPSILON)

    def __call__(self, images: Images, reference: Images) -> npt.NDArray[np.float64]:
        """Distances [B] of images [B,H,W,3] in [0,1] to a reference of the same shape.

        Raises NumericsError on shapes that differ, pictures that are too small, and values that are not finite or not
        in [0,1].
        """
        images, reference = checked_pair(images, reference, "lpips")
        if min(images.shape[1:3]) < self._trunk.smallest:
            size = f"{images.shape[1]}×{images.shape[2]}"
            raise NumericsError(
                f"lpips: pictures of {size} pixels are too small for {self._trunk.weights.network}, it takes"
                f" {self._trunk.smallest}"
            )
        count = max(1, PIXELS // (images.shape[1] * images.shape[2]))
        batches = [self._batch(images[i : i + count], reference[i : i + count]) for i in range(0, len(images), count)]
        return np.concatenate(batches)

    def _batch(self, images: Images, reference: Images) -> npt.NDArray[np.float64]:
        total = np.zeros(len(images))
        for index, (a, b) in enumerate(zip(self._features(images), self._features(reference), strict=True)):
            total += np.array(
                ((a - b) ** 2 @ self._weights[f"lin{index}.model.1.weight"].reshape(-1)).mean(axis=(1, 2))
            )
        return total


def load(trunk: Trunk, place: str | Path | None = None) -> Lpips:
    """With the published weights. The hub has only copies of them, so that the heads are checked against those of the
    ``lpips`` package.

    Raises ArtifactError on a missing or damaged file, and on one with other heads.
    """
    (path,) = trunk.weights.paths(place)
    arrays = read_tensors(path)
    network = Lpips(trunk, arrays, str(path))
    digest = sha256()
    for index in range(len(trunk.slices)):
        digest.update(np.array(arrays[f"lin{index}.model.1.weight"].astype(mx.float32)).tobytes())
    if digest.hexdigest() != trunk.heads:
        raise ArtifactError(
            f"{path}: its heads are not those of LPIPS v0.1; get the published ones with '{trunk.weights.command}'"
        )
    return network
