"""Inception-v3 as FID uses it: 2048 features of a picture, after the last pooling (arXiv 1512.00567; weights of
2015-12-05).

It is not the network of today's model zoos. Its average pools leave the padding out, its last block pools by maximum,
and the weights are TensorFlow's of 2015 as PyTorch got them from pytorch-fid, whose names parameters have. Pictures are
resized to 299×299 by Pillow's bicubic filter in floating point, as clean-fid does (arXiv 2104.11222); the resizing of
other tools moves FID by whole points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..numerics.convolution import convolved
from .images import Images, checked, resized
from .weights import Tensors, Weights, fitted, read_tensors, shared

SIDE = 299
WIDTH = 2048
BATCH = 8
EPSILON = 1e-3  # of the batch normalisations
WEIGHTS = Weights(
    "Inception-v3 (2015-12-05)",
    "toshas/torch-fidelity",
    ("weights-inception-2015-12-05-6726825d.pth",),
    "Apache-2.0",
    sha256="6726825d",
)


@dataclass(frozen=True)
class Convolution:
    """Convolution, batch normalisation, rectifier."""

    name: str
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True  # whether the result has the size of the input


@dataclass(frozen=True)
class Pool:
    """Over 3×3 pixels: maximum at a stride of 2 without padding, or mean (of the pixels inside) or maximum at a stride
    of 1.
    """

    kind: str  # "reduce", "mean", "max"


@dataclass(frozen=True)
class Fork:
    """Convolutions side by side of the same input, joined by channel."""

    paths: tuple[Convolution, ...]


Branch = tuple[Convolution | Pool | Fork, ...]
Block = tuple[str, tuple[Branch, ...]]


def _chain(prefix: str, *layers: tuple[int, int, int]) -> tuple[Convolution, ...]:
    """``prefix_1``, ``prefix_2``, … of (outputs, kernel height, kernel width)."""
    return tuple(Convolution(f"{prefix}_{i + 1}", out, (h, w)) for i, (out, h, w) in enumerate(layers))


def _reducing(name: str, outputs: int) -> Convolution:
    return Convolution(name, outputs, (3, 3), 2, same=False)


def _pooled(kind: str, outputs: int) -> Branch:
    return (Pool(kind), Convolution("branch_pool", outputs))


def _a(pooled: int) -> tuple[Branch, ...]:
    doubled = _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))
    return (
        (Convolution("branch1x1", 64),),
        _chain("branch5x5", (48, 1, 1), (64, 5, 5)),
        doubled,
        _pooled("mean", pooled),
    )


def _c(width: int) -> tuple[Branch, ...]:
    single = _chain("branch7x7", (width, 1, 1), (width, 1, 7), (192, 7, 1))
    doubled = _chain("branch7x7dbl", (width, 1, 1), (width, 7, 1), (width, 1, 7), (width, 7, 1), (192, 1, 7))
    return ((Convolution("branch1x1", 192),), single, doubled, _pooled("mean", 192))


def _e(pool: str) -> tuple[Branch, ...]:
    def fork(prefix: str) -> Fork:
        return Fork((Convolution(f"{prefix}a", 384, (1, 3)), Convolution(f"{prefix}b", 384, (3, 1))))

    return (
        (Convolution("branch1x1", 320),),
        (Convolution("branch3x3_1", 384), fork("branch3x3_2")),
        (*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), fork("branch3x3dbl_3")),
        _pooled(pool, 192),
    )


STEM: Branch = (
    _reducing("Conv2d_1a_3x3", 32),
    Convolution("Conv2d_2a_3x3", 32, (3, 3), same=False),
    Convolution("Conv2d_2b_3x3", 64, (3, 3)),
    Pool("reduce"),
    Convolution("Conv2d_3b_1x1", 80),
    Convolution("Conv2d_4a_3x3", 192, (3, 3), same=False),
    Pool("reduce"),
)
_6A: tuple[Branch, ...] = (
    (_reducing("branch3x3", 384),),
    (*_chain("branch3x3dbl", (64, 1, 1), (96, 3, 3)), _reducing("branch3x3dbl_3", 96)),
    (Pool("reduce"),),
)
_7A: tuple[Branch, ...] = (
    (Convolution("branch3x3_1", 192), _reducing("branch3x3_2", 320)),
    (*_chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1)), _reducing("branch7x7x3_4", 192)),
    (Pool("reduce"),),
)
BLOCKS: tuple[Block, ...] = (
    ("", (STEM,)),
    ("Mixed_5b.", _a(32)),
    ("Mixed_5c.", _a(64)),
    ("Mixed_5d.", _a(64)),
    ("Mixed_6a.", _6A),
    ("Mixed_6b.", _c(128)),
    ("Mixed_6c.", _c(160)),
    ("Mixed_6d.", _c(160)),
    ("Mixed_6e.", _c(192)),
    ("Mixed_7a.", _7A),
    ("Mixed_7b.", _e("mean")),
    ("Mixed_7c.", _e("max")),
)


def _convolutions() -> Iterator[tuple[str, Convolution, int]]:
    """Path, convolution and input channels of all of them, in the order of the graph."""
    width = 3
    for prefix, branches in BLOCKS:
        total = 0
        for branch in branches:
            channels = width
            for step in branch:
                if not isinstance(step, Pool):
                    paths = step.paths if isinstance(step, Fork) else (step,)
                    for path in paths:
                        yield prefix + path.name, path, channels
                    channels = sum(path.outputs for path in paths)
            total += channels
        width = total


def shapes() -> dict[str, tuple[int, ...]]:
    """Name to shape of every parameter, in PyTorch's layout."""
    found: dict[str, tuple[int, ...]] = {}
    for path, convolution, inputs in _convolutions():
        found[f"{path}.conv.weight"] = (convolution.outputs, inputs, *convolution.kernel)
        found |= {
            f"{path}.bn.{name}": (convolution.outputs,) for name in ("weight", "bias", "running_mean", "running_var")
        }
    return found


class Inception:
    """Features of pictures. ``title`` says which weights they come from, ``published`` whether those are known to be
    FID's.
    """

    def __init__(self, arrays: Tensors, source: str, published: bool = False):
        """``arrays`` under the names of ``shapes``; ArtifactError, naming ``source``, where they do not fit."""
        self.published = published
        self.title = WEIGHTS.network if published else f"Inception-v3 ({Path(source).name})"
        self._layers = _folded(fitted(arrays, shapes(), source))

    def forward(self, x: mx.array) -> mx.array:
        """Features [B,2048] of pictures [B,H,W,3] in [-1,1]."""
        for prefix, branches in BLOCKS:
            x = mx.concatenate([self._branch(prefix, branch, x) for branch in branches], axis=-1)
        return x.mean(axis=(1, 2))

    def _branch(self, prefix: str, branch: Branch, x: mx.array) -> mx.array:
        for step in branch:
            if isinstance(step, Pool):
                x = _pool(step.kind, x)
            elif isinstance(step, Fork):
                x = mx.concatenate([self._convolve(prefix, path, x) for path in step.paths], axis=-1)
            else:
                x = self._convolve(prefix, step, x)
        return x

    def _convolve(self, prefix: str, layer: Convolution, x: mx.array) -> mx.array:
        weight, bias = self._layers[prefix + layer.name]
        padding = (layer.kernel[0] // 2, layer.kernel[1] // 2) if layer.same else (0, 0)
        return convolved(x, weight, bias, layer.stride, padding, rectify=True)

    def __call__(self, images: Images) -> npt.NDArray[np.float32]:
        """Features [B,2048] of pictures [B,H,W,3] in [0,1]; NumericsError where they are none."""
        images = checked(images, "inception")
        found = []
        for start in range(0, len(images), BATCH):
            batch = np.stack([resized(image, (SIDE, SIDE)) for image in images[start : start + BATCH]])
            found.append(
                np.array(self.forward(mx.array((batch * 255 - 128) / 128)))
            )  # TensorFlow's scaling, as in clean-fid
        return np.concatenate(found)


def _pool(kind: str, x: mx.array) -> mx.array:
    if kind == "reduce":
        return nn.MaxPool2d(3, 2)(x)
    if kind == "max":
        return nn.MaxPool2d(3, 1, 1)(x)
    inside = nn.AvgPool2d(3, 1, 1)(mx.ones((1, *x.shape[1:3], 1)))  # the share of a window that is picture
    return nn.AvgPool2d(3, 1, 1)(x) / inside


def _folded(weights: Tensors) -> dict[str, tuple[mx.array, mx.array]]:
    """Weight [O,h,w,I] and bias [O] of each convolution with its normalisation, folded in float64."""
    layers = {}
    for path, _, _ in _convolutions():
        kernel, scale, shift, mean, variance = (
            np.array(weights[f"{path}.{name}"], dtype=np.float64)
            for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        )
        scale = scale / np.sqrt(variance + EPSILON)
        kernel = (kernel * scale[:, None, None, None]).transpose(0, 2, 3, 1)
        layers[path] = (mx.array(kernel.astype(np.float32)), mx.array((shift - mean * scale).astype(np.float32)))
    return layers


@shared
def load(place: str | Path | None) -> Inception:
    """With the published weights, or those of a local file."""
    (path,) = WEIGHTS.paths(place)
    return Inception(read_tensors(path), str(path), WEIGHTS.is_published(path))
