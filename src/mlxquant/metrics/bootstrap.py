"""How far a mean over prompts may be off: the percentile bootstrap (Efron, 1979).

Prompts are drawn with replacement. Two models on the same prompts are compared by the interval of their differences,
prompt by prompt, which is narrower than what two separate intervals say. What depends on the calibration, too, needs
several draws of it: ``crossed.py``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import NumericsError
from ..numerics.arrays import Array

PERCENTILES = (2.5, 97.5)


def interval(
    values: npt.ArrayLike, weights: npt.ArrayLike | None = None, seed: int = 0, draws: int = 2000
) -> list[float] | None:
    """The 95 % interval of a mean.

    Args:
        values: [N], of which the mean is taken.
        weights: [N], above 0: how much each counts in the mean, which is then the sum of products over the sum of
            weights of what was drawn; None where all count alike.
        seed: Of the draws.
        draws: How many.

    Returns:
        [low, high]; None for a single value, of which nothing can be said.

    Raises:
        NumericsError: No values, or some that are not finite, or other weights.
    """
    array: Array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise NumericsError(f"bootstrap: expected a list of finite values, found {array.size} of shape {array.shape}")
    if array.size == 1:
        return None
    picks = np.random.default_rng(seed).integers(0, array.size, (draws, array.size))
    if weights is None:
        means = array[picks].mean(1)
    else:
        counts: Array = np.asarray(weights, dtype=np.float64)
        if counts.shape != array.shape or not (counts > 0).all():
            raise NumericsError(f"bootstrap: expected {array.size} weights above 0, found {counts.tolist()}")
        means = (array * counts)[picks].sum(1) / counts[picks].sum(1)
    return [float(bound) for bound in np.percentile(means, PERCENTILES)]
