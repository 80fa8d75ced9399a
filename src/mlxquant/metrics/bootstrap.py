"""How far a mean over prompts may be off: the percentile bootstrap (Efron, 1979).

Prompts are drawn with replacement. Two models on the same prompts are compared by the interval of their differences,
prompt by prompt, which is narrower than what two separate intervals say.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import NumericsError
from ..numerics.arrays import Array

PERCENTILES = (2.5, 97.5)


def interval(values: npt.ArrayLike, seed: int = 0, draws: int = 2000) -> list[float] | None:
    """The 95 % interval [low, high] of the mean of values [N]; None for a single value, of which nothing can be said.

    Raises NumericsError on no values, and on values that are not finite.
    """
    array: Array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise NumericsError(f"bootstrap: expected a list of finite values, found {array.size} of shape {array.shape}")
    if array.size == 1:
        return None
    picks = np.random.default_rng(seed).integers(0, array.size, (draws, array.size))
    return [float(bound) for bound in np.percentile(array[picks].mean(1), PERCENTILES)]
