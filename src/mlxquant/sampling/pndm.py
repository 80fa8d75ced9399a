"""Pseudo numerical methods (PNDM, arXiv 2202.09778) without Runge-Kutta steps, as Stable Diffusion is published with:
a linear multistep method of order 4 that warms up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import AdapterError
from ..numerics.arrays import Array
from .parameterizations import EPSILON, V
from .schedulers import check_times
from .schedules import LEADING, Sigmas, Training, check_steps, spaced
from .walk import Walk

ADAMS_BASHFORTH = (  # weights of the newest prediction and those before it, by how many there are
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True)
class PNDM:
    """PLMS (arXiv 2202.09778, eq. 9 and 12); PNDMScheduler with ``skip_prk_steps``.

    A walk of n > 1 steps asks the model n + 1 times: the second prediction is taken where the first step ended, and
    the step is taken again with the mean of both. What comes after does not use it any more.

    Attributes:
        training: The levels that the model was trained at.
        spacing: See ``schedules.spaced``; fractions are rounded.
        offset: See there.
        to_zero: Whether the walk ends at the image; else at the least level of training.
        kind: What is put together from several steps, as the model predicts it: "epsilon" or "v".

    Raises:
        AdapterError: Another kind.
    """

    training: Training = field(default_factory=Training)
    spacing: str = LEADING
    offset: int = 0
    to_zero: bool = False
    kind: str = EPSILON

    def __post_init__(self) -> None:
        if self.kind not in (EPSILON, V):
            raise AdapterError(f"PNDM of predictions of kind {self.kind!r}; expected {EPSILON!r} or {V!r}")

    def walk(self, steps: int) -> Walk:
        """See ``Scheduler``; one more than ``steps`` where there are several."""
        check_steps(steps)
        times = spaced(len(self.training), steps, self.spacing, self.offset).round().astype(int)
        apart = len(self.training) // steps
        if steps > 1:
            times = np.insert(times, 1, times[1])
        begins, ends = times.copy(), times - apart
        if steps > 1:
            begins[1], ends[1] = times[1] + apart, times[1]  # the first step again
        check_times(begins, self.training)
        last = 1.0 if self.to_zero else self.training.alpha_bars[0]
        here = self.training.alpha_bars[begins]
        there = np.where(ends >= 0, self.training.alpha_bars[np.maximum(ends, 0)], last)
        carry, now = self._step(here, there)
        before = np.zeros((len(times), 4))
        for index in range(2, len(times)):
            weights = ADAMS_BASHFORTH[min(index - 1, 3)]
            places = [place for place in range(index + 1) if index - place != 1][: len(weights)]  # the second is none
            before[index, np.array(places[1:]) - 1] = now[index] * np.array(weights[1:])
            now[index] *= weights[0]
        if steps > 1:
            # from where the first step began, (latent - now[0] prediction) / carry[0]
            again = carry[1] / carry[0]
            before[1, 0] = now[1] / 2 - again * now[0]
            carry[1], now[1] = again, now[1] / 2
        bars = np.append(self.training.alpha_bars[times], last)
        return Walk(
            np.sqrt(bars),
            np.sqrt(1 - bars),
            self.kind,
            carry,
            now,
            before,
            np.zeros(len(times)),
            np.ones(len(times) + 1),
        )

    def _step(self, here: Sigmas, there: Sigmas) -> tuple[Sigmas, Sigmas]:
        """What steps between two levels multiply the latent and a prediction with, from their squared alphas."""
        carry = np.sqrt(there / here)
        noise = (here - there) / (here * np.sqrt(1 - there) + np.sqrt(here * (1 - here) * there))
        if self.kind == EPSILON:
            return carry, noise
        return carry + noise * np.sqrt(1 - here), noise * np.sqrt(here)

    def time(self, level: npt.ArrayLike) -> Array:
        """See ``Scheduler``; whole."""
        return self.training.nearest(level).astype(np.float32)

    def level(self, time: npt.ArrayLike) -> Sigmas:
        """See ``Scheduler``."""
        return np.interp(np.asarray(time, np.float64), np.arange(len(self.training)), self.training.levels)
