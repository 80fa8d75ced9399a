"""A matrix of low rank as the product of two thin ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Array


@dataclass(frozen=True)
class LowRank:
    """``up`` float16 [out,r] and ``down`` float16 [r,in]: ``y += (x downᵀ) upᵀ``. ``damping`` is the one that was
    chosen for it, if any.
    """

    up: Array
    down: Array
    damping: float | None = None

    @property
    def weight(self) -> Array:
        """What the branch stands for, float32 [out,in]."""
        product: Array = self.up.astype(np.float32) @ self.down.astype(np.float32)
        return product

    @property
    def rank(self) -> int:
        return int(self.up.shape[1])
