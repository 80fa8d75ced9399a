"""How wide the grid of a weight is: the extremes, or a search that clips a few weights to serve the others better.

The step matters as much as the rounding. A search tries a ladder of narrower grids, then improves the best of them by
turns: round, solve for the step in closed form, round again. A grid only gives way to one with less error, both as
stored.
"""

from __future__ import annotations

import numpy as np

from ...grids.weights import Grid, WeightFormat, fit_extremes, grouped, snap, snap_biases
from ...numerics.arrays import Array
from ...numerics.moments import Moments, calibrated_gram
from ..registry import register

# widths to try, relative to the extremes; the refits fill the gaps
LADDER = np.geomspace(0.94, 0.1, 36, dtype=np.float32)
REFITS = 5
CHUNK = 2**18  # weights searched at a time: three float32 buffers of them stay in a cache


@register("steps", "extremes", summary="the grid spans the extremes; nothing is clipped")
def extremes(weight: Array, format: WeightFormat, moments: Moments | None = None) -> Grid:
    """The grid that spans ``weight`` [out,in] in each row or group, by ``weights.fit_extremes``; ``moments`` is not
    used.
    """
    return fit_extremes(weight, format)


@register("steps", "mse", summary="search for the least squared weight error")
def mse(weight: Array, format: WeightFormat, moments: Moments | None = None) -> Grid:
    """The grid on which ``weight`` [out,in], rounded to nearest, has the least squared error; ``moments`` is
    not used.
    """
    return fitted(weight, format, np.ones(weight.shape[1]))


@register("steps", "search", summary="search for the least squared weight error, weighted by the inputs' power")
def search(weight: Array, format: WeightFormat, moments: Moments | None = None) -> Grid:
    """The grid on which ``weight`` [out,in], rounded to nearest, has the least Σ_j H_jj (w_j − q_j)², H =
    ``moments.gram``.

    The diagonal of H keeps the channels that the output hangs on inside the grid; the full H would need the rounding
    that comes later. Without moments all channels count the same, as in ``mse``.
    """
    if moments is None:
        return mse(weight, format)
    return fitted(weight, format, np.diagonal(calibrated_gram(moments, weight.shape[1])))


def fitted(weight: Array, format: WeightFormat, importance: Array) -> Grid:
    """The best grid found for ``weight`` [out,in], rounded to nearest, whose columns count as ``importance`` [in]
    says.
    """
    widest = fit_extremes(weight, format)
    groups = grouped(weight, format)
    units, count, columns = groups.shape
    importance = importance / (importance.max() or 1.0)
    importance = np.resize(importance, (count, columns)).astype(
        np.float32
    )  # resize repeats it where rows share a group
    scales, biases = widest.scales[:units].copy(), widest.biases[:units].copy()
    rows = max(1, CHUNK // (count * columns))
    for start in range(0, units, rows):
        chunk = slice(start, start + rows)
        best = _Best(groups[chunk].astype(np.float32), importance, format, scales[chunk], biases[chunk])
        for width in LADDER:
            clipped = best.offer(scales[chunk] * width, biases[chunk] * width)
            if (clipped > best.errors).all():  # and narrower grids clip no less
                break
        for _ in range(REFITS):
            before = best.errors
            best.offer(*best.refit())
            if (best.errors == before).all():
                break
        scales[chunk], biases[chunk] = best.scales, best.biases
    return Grid(format, *(np.ascontiguousarray(np.broadcast_to(v, widest.scales.shape)) for v in (scales, biases)))


class _Best:
    """The best ``scales`` and ``biases`` [rows,groups] offered so far, group by group, for weights
    [rows,groups,columns].

    ``errors`` [rows,groups] is what they leave.
    """

    def __init__(self, weights: Array, importance: Array, format: WeightFormat, scales: Array, biases: Array):
        self._weights, self._importance, self._format = weights, importance[:, :, None], format
        self._places, self._codes = np.empty_like(weights), np.empty_like(weights)
        self.scales, self.biases = scales.copy(), biases.copy()
        self._mass = self._importance[:, :, 0].sum(1)
        self.errors = self._round(scales, biases)

    def _total(self, values: Array) -> Array:
        """Sums [rows,groups] over the columns of values [rows,groups,columns], weighted by importance."""
        totals: Array = (values.transpose(1, 0, 2) @ self._importance)[:, :, 0].T
        return totals

    def _round(self, scales: Array, biases: Array) -> Array:
        """Leave the nearest codes in ``_codes`` and return the weighted squared errors [rows,groups]."""
        inverse = 1 / scales[:, :, None]
        places = np.multiply(self._weights, inverse, out=self._places)
        places -= biases[:, :, None] * inverse
        np.rint(places, out=self._codes)
        np.clip(self._codes, 0, self._format.levels - 1, out=self._codes)
        places -= self._codes
        places *= places
        errors: Array = self._total(places) * scales**2
        return errors

    def offer(self, scales: Array, biases: Array) -> Array:
        """Take these, as they will be stored, for the groups that they suit better. Symmetric biases follow from the
        scales.

        Returns the least error [rows,groups] that comes from clipping: inside a grid no weight is further from it than
        half a step.
        """
        scales, format = snap(scales, self._format), self._format
        biases = -format.zero_code * scales if format.symmetric else snap_biases(biases, scales, format)
        errors = self._round(scales, biases)
        better = errors < self.errors
        self.errors = np.where(better, errors, self.errors)
        self.scales = np.where(better, scales, self.scales)
        self.biases = np.where(better, biases, self.biases)
        clipped: Array = errors - self._mass * (scales / 2) ** 2
        return clipped

    def refit(self) -> tuple[Array, Array]:
        """What fits the present codes best: weighted least squares of weight on code, through zero where symmetric."""
        self._round(self.scales, self.biases)
        if self._format.symmetric:
            weight_mean, code_mean = np.zeros_like(self.scales), np.full_like(self.scales, self._format.zero_code)
        else:
            mass = np.maximum(self._mass, np.finfo(np.float32).tiny)
            weight_mean, code_mean = self._total(self._weights) / mass, self._total(self._codes) / mass
        offsets = self._codes - code_mean[:, :, None]
        spread = self._total(offsets * offsets)
        scales = np.divide(self._total(offsets * self._weights), spread, out=self.scales.copy(), where=spread > 0)
        return scales, weight_mean - scales * code_mean
