"""Tensors as ``save-weights`` writes them: signed codes beside a scale, a zero point and a number of bits.

``value = scale * (codes - zero_point)``; all four have the tensor's name and their own after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..numerics.arrays import Array
from .arrays import StoredArray

PARTS = ("codes", "scale", "zero_point", "bits")


@dataclass(frozen=True)
class CodedTensor:
    """``parts`` are its arrays by their own names."""

    name: str
    parts: dict[str, StoredArray]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts["codes"].shape

    def bits(self) -> int:
        return int(self.parts["bits"].read().item())

    def codes(self, stride: int = 1) -> Array:
        """int16, of every ``stride``-th entry of the first axis."""
        return self.parts["codes"].read(stride).astype(np.int16)

    def values(self, stride: int = 1) -> Array:
        """float32, what the codes stand for."""
        scale, zero = (
            self.parts[name].read(stride if self.parts[name].shape[0] > 1 else 1) for name in ("scale", "zero_point")
        )
        values: Array = (scale * (self.codes(stride) - zero)).astype(np.float32)
        return values


def coded_tensors(arrays: Sequence[StoredArray]) -> list[CodedTensor]:
    """Every tensor of which all parts are there, in the order of the file."""
    by_name = {array.name: array for array in arrays}
    found = []
    for array in arrays:
        name = array.name.removesuffix(".codes")
        parts = {part: by_name[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in by_name}
        if len(parts) == len(PARTS) and array.dtype == "int8" and array.shape and parts["bits"].size == 1:
            found.append(CodedTensor(name, parts))
    return found
