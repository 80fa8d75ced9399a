"""Random tensors that behave like a trained model's, and files of them that are written one tensor at a time.

Every tensor, output channel and input channel has its own scale, and some input channels are outliers. A seed gives the
same bytes.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import mlxquant  # noqa: F401  # before mlx

# isort: split
from mlxquant.commandline.console import progress
from mlxquant.files.atomic import atomic_file

OUTLIERS = 128  # one channel in this many


@dataclass(frozen=True)
class Tensor:
    """What a tensor is drawn from: normal of this ``scale`` around ``mean``, times a lognormal factor for the tensor
    and one for each row; the rows fall into equal ``parts`` with a factor each; one channel in 128 is ``outlier`` times
    larger.
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    mean: float = 0.0
    parts: tuple[float, ...] = (1.0,)
    outlier: float = 1.0

    def draw(self, seed: int) -> npt.NDArray[np.float16]:
        """The same values for the same seed and name."""
        random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(self.name.encode())]))
        rows, axis = self.shape[0], min(1, len(self.shape) - 1)
        factors = (
            self.scale
            * random.lognormal(0, 0.2)
            * random.lognormal(0, 0.2, rows)
            * np.repeat(self.parts, rows // len(self.parts))
        )
        outliers = random.choice(self.shape[axis], -(-self.shape[axis] // OUTLIERS), replace=False)
        values = random.standard_normal(self.shape, np.float32)
        values *= factors.astype(np.float32).reshape(-1, *[1] * (len(self.shape) - 1))
        values[(slice(None),) * axis + (outliers,)] *= np.float32(self.outlier)
        values += np.float32(self.mean)
        return values.astype("<f2")


def linear(
    name: str, rows: int, columns: int, gain: float = 1.0, parts: tuple[float, ...] = (1.0,), bias: float = 0.1
) -> Iterator[Tensor]:
    """A Linear that maps inputs of unit scale to outputs of scale ``gain``, with outliers among its input channels and
    its biases.
    """
    yield Tensor(f"{name}.weight", (rows, columns), gain / math.sqrt(columns), parts=parts, outlier=4.0)
    yield Tensor(f"{name}.bias", (rows,), bias, parts=parts, outlier=8.0)


def convolution(name: str, rows: int, columns: int, side: int, gain: float = 1.0) -> Iterator[Tensor]:
    """PyTorch's layout [out, in, side, side]."""
    yield Tensor(f"{name}.weight", (rows, columns, side, side), gain / (math.sqrt(columns) * side))
    yield Tensor(f"{name}.bias", (rows,), 0.05)


def norm(name: str, channels: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (channels,), 0.1, mean=1.0)
    yield Tensor(f"{name}.bias", (channels,), 0.1)


def write_tensors(path: Path, tensors: Iterable[Tensor], seed: int) -> None:
    """A safetensors file, one tensor in memory at a time; the file takes its name when it is complete."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    header, end = {}, 0
    for tensor in ordered:
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": "F16", "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in progress(ordered, path.name):
            file.write(tensor.draw(seed))
