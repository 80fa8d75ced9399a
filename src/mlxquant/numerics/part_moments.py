"""Moments of the inputs of a layer whose weight is one matrix or several: what is known of a layer when it is rounded,
whatever its kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import Array
from .moments import Moments, energy


class PartMoments:
    """The moments of each part's inputs.

    Attributes:
        parts: One for each of the equal slices of the weight's rows.
        alone: Whether a token meets one part alone, which then writes all that the layer writes for it; without, each
            part writes its share for every token.
        looked_up: Of a table, how often each of its rows was asked for [rows]; its moments are then those of inputs
            that are seen one number at a time, so that methods minimise the error of the weight itself.
        share: That of the layer's outputs which the moments are of; below 1 where some stand for all.
    """

    def __init__(self, parts: Sequence[Moments], alone: bool = False, looked_up: Array | None = None):
        self.parts, self.alone, self.looked_up = tuple(parts), alone, looked_up
        self.share = 1.0

    @classmethod
    def one(cls, moments: Moments) -> PartMoments:
        """Of a layer whose weight is one matrix."""
        return cls([moments])

    @classmethod
    def of_table(cls, looked_up: Array, width: int) -> PartMoments:
        """Of a table [rows, width] whose rows were looked up so often."""
        gram = np.eye(width, dtype=np.float32)
        return cls([Moments(gram, max(1, int(looked_up.sum())), gram)], looked_up=looked_up)

    @property
    def centred(self) -> PartMoments:
        """Those of each part's tokens less their mean."""
        return PartMoments([part.centred for part in self.parts], self.alone, self.looked_up)

    @property
    def without_data(self) -> list[int]:
        """Parts that no token reached."""
        return [index for index, part in enumerate(self.parts) if part.count == 0]

    @property
    def count(self) -> float:
        """Tokens that the layer wrote."""
        if self.looked_up is not None:
            return max(1.0, float(self.looked_up.sum()))
        each = [part.count for part in self.parts]
        return sum(each) if self.alone else each[0]

    def errors(self, change: Array) -> Array:
        """The squared error that a ``change`` [rows, in] of the weight makes in each output, summed over tokens:
        float64 [outputs].
        """
        if self.looked_up is not None:
            return np.einsum("r,rk,rk->k", self.looked_up, change, change, dtype=np.float64)
        slices = np.split(change, len(self.parts))
        each = [energy(some, part.gram) for some, part in zip(slices, self.parts, strict=True)]
        return np.sum(each, axis=0) if self.alone else np.concatenate(each)

    def relative_error(self, weight: Array, quantized: Array) -> float:
        """Relative output error ‖X(W−Q)ᵀ‖ / ‖XWᵀ‖ of weights [rows, in]; 0 for equal weights."""
        noise, signal = self.errors(weight - quantized).sum(), self.errors(weight).sum()
        if noise == 0:
            return 0.0
        return float(np.sqrt(noise / signal)) if signal > 0 else float("inf")
