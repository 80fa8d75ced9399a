"""Noise levels: the one number that names one, the levels that models were trained at, and the grids of samplers.

A model reads ``alpha image + sigma noise``. What differs between families of models is how the two are scaled, and not
what is in them, so one number says how noisy a latent is: the share ``level = sigma / (alpha + sigma)``, 0 for an image
and 1 for noise alone. Its log-SNR is ``2 ln(alpha / sigma) = 2 ln((1 - level) / level)`` for all of them:

- rectified flow, alpha = 1 - sigma: the level is sigma itself;
- variance preserving, alpha² + sigma² = 1, alpha² the product of all (1 - beta) up to t: ``sigma / (alpha + sigma)``;
- variance exploding, alpha = 1: ``sigma / (1 + sigma)``, the same level as that of the latent that the model is shown,
  which is divided by ``sqrt(1 + sigma²)`` and so preserves variance.

The clock shows levels, activation tables are sorted by them, calibration data is kept by them. ``sigma`` means the
level wherever a number says how noisy something is, as it always did for flows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..errors import AdapterError

Sigmas = npt.NDArray[np.float64]

LINEAR, SCALED, COSINE = BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
LINSPACE, LEADING, TRAILING = SPACINGS = ("linspace", "leading", "trailing")
KARRAS, EXPONENTIAL = GRIDS = ("karras", "exponential")
RHO = 7.0  # of Karras' grid
SMALLEST_SIGNAL = 2.0**-24  # what is left of alpha² where a schedule has none and a sampler divides by it


def noise_level(alpha: npt.ArrayLike, sigma: npt.ArrayLike) -> Sigmas:
    """The level in [0,1] of ``alpha image + sigma noise``, see above; any shape."""
    a, s = np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)
    return s / (a + s)


def check_steps(steps: int) -> None:
    """Raise AdapterError on a walk without steps."""
    if steps < 1:
        raise AdapterError(f"steps must be at least 1, found {steps}")


def shifted(sigma: npt.ArrayLike, shift: float) -> Sigmas:
    """``shift sigma / (1 + (shift - 1) sigma)`` (arXiv 2403.03206 eq. 23): more steps where there is more noise."""
    s = np.asarray(sigma, np.float64)
    return shift * s / (1 + (shift - 1) * s)


def flow_sigmas(steps: int, shift: float = 1.0, trained: int = 1000) -> Sigmas:
    """The ``steps + 1`` noise levels of SD3's flow sampler, from 1 down to 0.

    Shifted, on evenly spaced t from ``trained`` to the schedule's own smallest t, then 0: DiffusionKit's grid, value
    for value. Raises AdapterError when ``steps`` < 1.
    """
    check_steps(steps)
    smallest = float(shifted(1 / trained, shift))
    return np.append(shifted(np.linspace(1.0, smallest, steps), shift), 0.0)


def resampled(sigmas: Sigmas, grid: str, steps: int, least: float | None = None, most: float | None = None) -> Sigmas:
    """Other levels between the ends of ``sigmas``, which descend.

    Args:
        sigmas: Noise per image, any number of them.
        grid: "karras" (arXiv 2206.00364 eq. 5, rho = 7) or "exponential", evenly spaced logarithms.
        steps: How many.
        least: The last one; None for that of ``sigmas``.
        most: The first one; None for that of ``sigmas``.

    Returns:
        float64 [steps], descending.
    """
    first, last = sigmas[0] if most is None else most, sigmas[-1] if least is None else least
    if grid == KARRAS:
        ends = first ** (1 / RHO), last ** (1 / RHO)
        return np.asarray((ends[0] + np.linspace(0, 1, steps) * (ends[1] - ends[0])) ** RHO)
    return np.exp(np.linspace(np.log(first), np.log(last), steps))


def spaced(trained: int, count: int, spacing: str, offset: int = 0, last: int | None = None) -> Sigmas:
    """Descending timesteps out of those that a model was trained at, as diffusers spaces them.

    Args:
        trained: How many there are, from 0.
        count: How many to take.
        spacing: "linspace", both ends and fractions between them; "leading", multiples from 0; "trailing", multiples
            from the end, fewer where ``last`` cuts some off. See table 2 of arXiv 2305.08891.
        offset: Added to those of "leading".
        last: Only timesteps below this; None for all.

    Raises:
        AdapterError: More are asked for than there are.
    """
    last = trained if last is None else last
    if count > last:
        raise AdapterError(f"{count} steps of a model that was trained at {last}; take fewer")
    if spacing == LINSPACE:
        return np.linspace(0, last - 1, count)[::-1]
    if spacing == LEADING:
        return np.arange(count, dtype=np.float64)[::-1] * (last // count) + offset
    return np.arange(last, 0, -trained / count)[:count].round() - 1


@dataclass(frozen=True)
class Training:
    """The noise levels that a variance-preserving model was trained at, timesteps 0 to ``steps - 1``.

    Computed in float32 as in the code that such models were trained with: the last digits of a product of 1000 factors
    are those of its factors' rounding.

    Attributes:
        steps: T, how many.
        first: The first beta.
        last: The last.
        schedule: Between them "linear"; "scaled_linear", linear in the square root; or "squaredcos_cap_v2", the cosine
            schedule of arXiv 2102.09672 eq. 17 without ends.
        betas: All of them, in place of a schedule.
        zero_snr: Whether alphas are rescaled so that the last level is noise alone (arXiv 2305.08891, algorithm 1).

    Raises:
        AdapterError: Betas that are none, or another schedule.
    """

    steps: int = 1000
    first: float = 0.0001
    last: float = 0.02
    schedule: str = LINEAR
    betas: tuple[float, ...] | None = None
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in BETAS:
            raise AdapterError(f"unknown schedule of betas {self.schedule!r}; expected one of {', '.join(BETAS)}")
        given = self.betas if self.betas is not None else (self.first, self.last)
        if not given or not all(0 < beta < 1 for beta in given) or self.steps < 1:
            raise AdapterError("betas must be between 0 and 1, at least one of them")

    def __len__(self) -> int:
        return len(self.alpha_bars)

    @cached_property
    def alpha_bars(self) -> Sigmas:
        """alpha² [T], descending: float32 values."""
        betas = self._betas().astype(np.float32)
        bars = _products(1 - betas)
        if self.zero_snr:
            roots = np.sqrt(bars)
            roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
            bars = roots**2
            alphas = np.concatenate([bars[:1], bars[1:] / bars[:-1]])
            bars = _products(1 - (1 - alphas))
        return bars.astype(np.float64)

    def _betas(self) -> npt.NDArray[np.float32]:
        if self.betas is not None:
            return np.array(self.betas, np.float32)
        if self.schedule == COSINE:
            bars = np.cos((np.arange(self.steps + 1) / self.steps + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - bars[1:] / bars[:-1], 0.999).astype(np.float32)
        if self.schedule == SCALED:
            return np.linspace(self.first**0.5, self.last**0.5, self.steps).astype(np.float32) ** 2
        return np.linspace(self.first, self.last, self.steps).astype(np.float32)

    @cached_property
    def sigmas(self) -> Sigmas:
        """Noise per image, sqrt(1 - alpha²) / alpha [T], ascending and finite: float32 values."""
        bars = self.alpha_bars.astype(np.float32)
        if self.zero_snr:
            bars[-1] = SMALLEST_SIGNAL
        return np.sqrt((1 - bars) / bars).astype(np.float64)

    def at(self, times: npt.ArrayLike, logarithmic: bool = False) -> Sigmas:
        """Noise per image at timesteps, linear between them, or with linear logarithms; any shape."""
        t, places = np.asarray(times, np.float64), np.arange(len(self))
        return np.exp(np.interp(t, places, np.log(self.sigmas))) if logarithmic else np.interp(t, places, self.sigmas)

    def times(self, sigmas: npt.ArrayLike, logarithmic: bool = False) -> Sigmas:
        """Timesteps, with fractions, of noise per image: the inverse of ``at``, or with linear logarithms between."""
        s, own = np.asarray(sigmas, np.float64), self.sigmas
        if logarithmic:
            return np.interp(np.log(np.maximum(s, 1e-10)), np.log(own), np.arange(len(self)))
        return np.interp(s, own, np.arange(len(self)))

    @cached_property
    def levels(self) -> Sigmas:
        """The noise levels [T], ascending."""
        return noise_level(np.sqrt(self.alpha_bars), np.sqrt(1 - self.alpha_bars))

    def nearest(self, levels: npt.ArrayLike) -> Sigmas:
        """The timesteps, without fractions, whose levels are nearest to some."""
        own = self.levels
        return np.rint(np.interp(np.asarray(levels, np.float64), own, np.arange(len(self))))


def _products(factors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Of the first one, two, … factors."""
    return np.cumprod(factors, dtype=np.float64).astype(np.float32)
