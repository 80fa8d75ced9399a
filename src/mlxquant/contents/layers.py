"""Quantized layers as files hold them: format, shape, where the codes are, and how they become weights again.

Two layouts: packed as MLX packs (``path.weight`` uint32 with scales and biases; ours and mlx-lm's), and signed codes in
npz files (``path__weight_int``). What is stored says which grid it is on, or a file beside it does; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..errors import ArtifactError, RecipeError
from ..files.schema import either, entries
from ..grids.packing import unpack
from ..grids.weights import FORMAT, Grid, WeightFormat
from ..layers.names import BIASES, BITS, DIVISOR, INTEGERS, LOG, SCALES, SIGMA, STEP, TOKEN, UP, WEIGHT
from ..layers.packed import weight_bytes
from ..layers.sizes import numbers_in, planned_bytes
from ..numerics.arrays import Array
from .arrays import StoredArray

SIGNED, SCALE, DIVIDES = "weight_int", "scale", "divisor"  # of a layer in an npz file, and its activation table
SIGNED_TABLE = ("a_sigma", "a_scale", "a_bits")


@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer: ``shape`` (out, in), ``parts`` its arrays by the name that they have in it, ``rotation`` the
    channels of its input that are rotated together, ``error`` its relative output error when it was made, where that is
    known.
    """

    path: str
    shape: tuple[int, int]
    format: WeightFormat
    parts: dict[str, StoredArray]
    rotation: int = 1
    error: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes, scales, biases, divisor and branch; for signed codes, when they will be packed."""
        if SIGNED in self.parts:
            divisor = self.parts[DIVIDES].nbytes if DIVIDES in self.parts else 0
            scales = self._rows(SCALE, 1)
            each = np.dtype(Grid(self.format, scales, -self.format.zero_code * scales).dtype).itemsize
            return 8 * (planned_bytes(self.format, self.shape, each) + divisor) / self.weights
        return 8 * weight_bytes(self.parts) / self.weights

    @property
    def extras(self) -> str:
        """What happens to the input before it is rounded, and beside the integer weight, in words."""
        rank = self.parts[UP].shape[1] if UP in self.parts else 0
        found = {
            "divided": DIVISOR in self.parts or DIVIDES in self.parts,
            f"rotated by {self.rotation}": self.rotation > 1,
            f"rank {rank} beside": rank > 0,
            "logarithmic": LOG in self.parts,
        }
        return ", ".join(text for text, there in found.items() if there)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def table(self) -> tuple[Array, Array, Array] | None:
        """Noise levels [T] ascending, activation steps [T] and bits [T]; None where the input stays as it is."""
        names = (SIGMA, STEP, BITS) if STEP in self.parts else SIGNED_TABLE
        if not all(name in self.parts for name in names):
            return None
        sigma, step, bits = (self.parts[name].read() for name in names)
        return sigma, step, bits

    def codes(self, stride: int = 1) -> Array:
        """Signed codes int16 [rows, in] around the code that means zero on a symmetric grid, of every ``stride``-th
        output.
        """
        if SIGNED in self.parts:
            return self.parts[SIGNED].read(stride).astype(np.int16)
        words = self.parts[WEIGHT].read(stride)  # of experts side by side: of every stride-th expert
        codes = unpack(words.reshape(-1, words.shape[-1]), self.format.bits, self.shape[1])
        return codes.astype(np.int16) - self.format.zero_code

    def weight(self, stride: int = 1) -> Array:
        """The weight float32 [rows, in] of every ``stride``-th output, as the layer multiplies its transformed input by
        it. What scales that are no finite numbers make of it is no finite number either.
        """
        codes = self.codes(stride) + self.format.zero_code
        scales = self._rows(SCALE if SIGNED in self.parts else SCALES, stride)
        with np.errstate(over="ignore", invalid="ignore"):
            biases = self._rows(BIASES, stride) if BIASES in self.parts else -self.format.zero_code * scales
            return Grid(self.format, scales, biases).dequantize(codes)

    def _rows(self, name: str, stride: int) -> Array:
        """Scales or biases float32 [rows or 1, groups]."""
        part = self.parts[name]
        values = part.read(stride if part.shape[0] > 1 else 1).astype(np.float32)
        return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values[:, None]


def stored_layers(
    formats: Mapping[str, Mapping[str, Any]], arrays: Sequence[StoredArray], errors: Mapping[str, float] | None = None
) -> list[StoredLayer]:
    """Layers whose formats a file of ours gives, by path; raises ArtifactError when their arrays are not there or do
    not fit.
    """
    named = {array.name: array for array in arrays}
    found = []
    for path, facts in formats.items():
        either(entries({"format": FORMAT}), FORMAT)(facts, f"layer {path}")
        start = f"{path}." if f"{path}.{WEIGHT}" in named else f"{path}__"
        parts = {name.removeprefix(start): array for name, array in named.items() if name.startswith(start)}
        main = parts.get(WEIGHT) or parts.get(SIGNED)
        scales = parts.get(SCALES) or parts.get(SCALE)
        if main is None or scales is None:
            raise ArtifactError(
                f"layer {path}: its codes and scales are not in the files that are there; write them anew"
            )
        format = WeightFormat(**facts.get("format", facts))
        rows, width = facts.get("shape", main.shape)
        expected = (rows, -(-width * format.bits // 32) if WEIGHT in parts else width)
        if (prod(main.shape[:-1]), main.shape[-1]) != expected:
            raise ArtifactError(
                f"layer {path}: codes of shape {main.shape} in {main.file}, expected {expected}; write it anew"
            )
        found.append(
            StoredLayer(path, (rows, width), format, parts, int(facts.get("rotation", 1)), (errors or {}).get(path))
        )
    return found


def foreign_layers(quantization: Mapping[str, Any], arrays: Sequence[StoredArray]) -> list[StoredLayer]:
    """Layers of a checkpoint that MLX quantized: affine, packed, with the bits and group sizes that its config.json
    gives.
    """
    named = {array.name: array for array in arrays}
    found = []
    for name, scales in named.items():
        path = name.removesuffix(f".{SCALES}")
        packed = named.get(f"{path}.{WEIGHT}")
        own = quantization.get(path, {})
        if (
            path == name
            or packed is None
            or packed.dtype != "uint32"
            or len(packed.shape) not in (2, 3)
            or own is False
        ):
            continue
        facts = {**quantization, **(own if isinstance(own, Mapping) else {})}
        parts = {part: named[f"{path}.{part}"] for part in INTEGERS if f"{path}.{part}" in named}
        try:
            bits, group = int(facts["bits"]), int(facts["group_size"])
            format = WeightFormat(bits, group, symmetric=False)
        except (KeyError, TypeError, ValueError, RecipeError):
            continue
        rows, width = prod(packed.shape[:-1]), packed.shape[-1] * 32 // bits
        if (
            facts.get("mode", "affine") == "affine"
            and BIASES in parts
            and scales.shape == (*packed.shape[:-1], width // group)
        ):
            found.append(StoredLayer(path, (rows, width), format, parts))
    return found


def unnamed_layers(layers: Sequence[StoredLayer], arrays: Sequence[StoredArray]) -> int:
    """How many layers look packed (uint32 with scales) and are not among ``layers``, because nothing says on which grid
    they are.
    """
    known = {layer.path for layer in layers}
    names = {array.name for array in arrays}
    packed = (
        a.name.removesuffix(f".{WEIGHT}") for a in arrays if a.dtype == "uint32" and a.name.endswith(f".{WEIGHT}")
    )
    return sum(path not in known and f"{path}.{SCALES}" in names for path in packed)


def activation_text(layer: StoredLayer) -> str:
    """How a layer's input is quantized: ``A8 x28`` for 8 bits at 28 noise levels, ``A4-8`` where levels differ, ``-``
    for not at all.
    """
    table = layer.table()
    if table is None:
        return f"A{layer.parts[TOKEN].read()[0]} a token" if TOKEN in layer.parts else "-"
    bits = np.unique(table[2])
    return f"A{bits[0]}{f'-{bits[-1]}' if len(bits) > 1 else ''} x{len(table[2])}"


def without_parts(arrays: Sequence[StoredArray], layers: Sequence[StoredLayer]) -> list[StoredArray]:
    """The arrays that belong to no quantized layer."""
    used = {id(part) for layer in layers for part in layer.parts.values()}
    return [array for array in arrays if id(array) not in used]


def bits_per_weight(arrays: Sequence[StoredArray], layers: Sequence[StoredLayer]) -> float:
    """Stored bits over parameters of everything in the files, as ``Size.bits_per_weight``: a quantized weight counts
    once, what stands for it and what quantizes its input not at all. Only for packed layers.
    """
    total = numbers_in(((array.name, array) for array in arrays), {layer.path: layer.weights for layer in layers})
    return 8 * sum(array.nbytes for array in arrays) / total if total else 0.0
