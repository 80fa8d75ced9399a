"""A matrix of low rank as the product of two thin ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Array

HALF = 2.0**-11  # by how much float16 changes a number, where it has all its digits


@dataclass(frozen=True)
class LowRank:
    """``up`` [out,r] and ``down`` [r,in]: ``y += (x downᵀ) upᵀ``. Both are float16, or both are float32 where that
    would cost a direction digits. ``damping`` is the one that was chosen for it, if any.
    """

    up: Array
    down: Array
    damping: float | None = None

    @classmethod
    def rounded(cls, up: Array, down: Array) -> LowRank:
        """Of factors of any precision, as they will be stored."""
        with np.errstate(over="ignore"):
            halves = up.astype(np.float16), down.astype(np.float16)
        fits = all(
            (np.linalg.norm(exact - half, axis=axis) <= HALF * np.linalg.norm(exact, axis=axis)).all()
            for exact, half, axis in ((up.astype(np.float64), halves[0], 0), (down.astype(np.float64), halves[1], 1))
        )
        return cls(*halves) if fits else cls(up.astype(np.float32), down.astype(np.float32))

    @property
    def weight(self) -> Array:
        """What the branch stands for, float32 [out,in]."""
        product: Array = self.up.astype(np.float32) @ self.down.astype(np.float32)
        return product

    @property
    def rank(self) -> int:
        return int(self.up.shape[1])
