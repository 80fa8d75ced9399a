"""Noise levels as quantized layers see them: their log-SNR, and the clock that shows which one is running.

A level is ``sigma / (alpha + sigma)`` of a latent ``alpha image + sigma noise``, in [0,1]; of a rectified flow that is
sigma itself. ``sampling.schedules`` defines it, and no layer has to know of which family its model is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from ..errors import AdapterError
from ..numerics.arrays import Array
from ..sampling.schedules import Sigmas


def log_snr(sigma: npt.ArrayLike, limit: float = 10.0) -> Sigmas:
    """Log signal-to-noise ratio of noise levels, ``2 ln(alpha / sigma) = 2 ln((1 - level) / level)`` in nats, clamped
    to +-limit; odd around 1/2.
    """
    s = np.asarray(sigma, np.float64)
    with np.errstate(divide="ignore"):
        return np.clip(2 * (np.log1p(-s) - np.log(s)), -limit, limit)


class Clock:
    """Tells quantized layers which noise level in [0,1] is running: one, or one for each sample of the batch.

    The sampler (or a sweep) sets it around a forward pass; reading it unset raises, so no layer can run on a stale or
    default time. A model that knows no time has a clock that stands still.
    """

    def __init__(self, still: float | None = None) -> None:
        """With ``still`` the clock always shows that."""
        self._sigma: npt.NDArray[np.float32] | None = None if still is None else np.atleast_1d(np.float32(still))

    @property
    def sigma(self) -> npt.NDArray[np.float32]:
        """[1] or [B] float32; raises AdapterError when no forward pass is announced."""
        if self._sigma is None:
            raise AdapterError(
                "a layer with per-timestep activation scales ran while no timestep was set; run it through the model's"
                " sampler"
            )
        return self._sigma

    @contextmanager
    def at(self, sigma: float | Sequence[float] | Array) -> Iterator[None]:
        """Announce the noise level of the forward passes inside; the previous one returns afterwards, also after an
        exception.
        """
        before, self._sigma = self._sigma, np.atleast_1d(np.asarray(sigma, np.float32))
        try:
            yield
        finally:
            self._sigma = before
