"""What one call of a layer says of its inputs: rows of a matrix product for each part of its weight, and their
extremes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import Array


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of a call.

    Attributes:
        parts: For each part of the weight the rows that it multiplied, float32 [samples, tokens, in].
        low: Each sample's minimum float32 [samples, in] over all that was read, not over the rows alone; None where
            the input is no array of numbers.
        high: Its maximum.
        share: That of the layer's outputs whose rows are here; below 1 where some stand for all.
        looked_up: How often each row of a table was asked for, float64 [rows]; None where the layer is no table.
    """

    parts: Sequence[Array]
    low: Array | None = None
    high: Array | None = None
    looked_up: Array | None = None
    share: float = 1.0

    @classmethod
    def of_tokens(cls, values: Array) -> LayerInputs:
        """Of a layer that multiplies tokens [samples, tokens, in] as they are."""
        return cls([values], values.min(1), values.max(1))

    @property
    def rows(self) -> Array:
        """Those of all parts, one after the other [tokens, in]."""
        flat = [part.reshape(-1, part.shape[-1]) for part in self.parts]
        return flat[0] if len(flat) == 1 else np.concatenate(flat)
