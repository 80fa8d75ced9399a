"""Noise levels that a sampler walks. In rectified flow ``x_sigma = (1 - sigma) image + sigma noise`` and t = 1000
sigma.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import AdapterError

Sigmas = npt.NDArray[np.float64]


def flow_sigmas(steps: int, shift: float = 1.0) -> Sigmas:
    """The ``steps + 1`` noise levels of SD3's flow sampler, from 1 down to 0.

    ``sigma' = shift sigma / (1 + (shift - 1) sigma)`` (arXiv 2403.03206 eq. 23) on evenly spaced t from 1000 to the
    schedule's own smallest t, then 0: DiffusionKit's grid, value for value. Raises AdapterError when ``steps`` < 1.
    """
    if steps < 1:
        raise AdapterError(f"steps must be at least 1, found {steps}")

    def shifted(sigma: Sigmas) -> Sigmas:
        return shift * sigma / (1 + (shift - 1) * sigma)

    smallest = float(shifted(np.array(1 / 1000)))
    return np.append(shifted(np.linspace(1.0, smallest, steps)), 0.0)
