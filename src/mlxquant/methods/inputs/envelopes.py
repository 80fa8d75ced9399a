"""Ranges as smooth curves over time that clip nothing: upper-envelope polynomials.

Least squares through the largest values seen lies below about half of them, and clips what is above. So both ends
of the range are polynomials in sigma that lie on the outside of everything that calibration saw, as near to it, in
least squares, as that allows. With few calibration pictures, whose extremes jump from one noise level to the next, such
a curve also covers what they happened to miss; at 4 bits, where the step matters more than clipping, it costs more than
it saves (``benchmarks/time_networks.py``).
"""

from __future__ import annotations

import numpy as np

from ...grids.tables import ActivationTable
from ...numerics.arrays import Array
from ...numerics.input_ranges import InputRanges
from ..registry import register
from .clipping import affine_table

SWEEPS = 2000


def upper_envelope(basis: Array, values: Array) -> Array:
    """The combination of the columns of ``basis`` [T,d] nearest to ``values`` [T] that is nowhere below them, [T]
    float64.

    ``min ‖f − y‖²`` over f in the span of the basis with ``f ≥ y`` is ``f = P(y + μ)``, P the projection on the span
    and μ ≥ 0 the multipliers, which coordinate ascent on the dual finds (Hildreth 1957). What is left of a violation at
    the end is added to f, so that the result is exactly an envelope; the basis is to contain the constants for that.
    """
    y = values.astype(np.float64)
    directions, _ = np.linalg.qr(basis)
    projection = directions @ directions.T
    slack = projection @ y - y  # f − y, which has to become ≥ 0
    scale = float(np.abs(slack).max())
    multipliers = np.zeros(len(y))
    for _ in range(SWEEPS):
        largest = 0.0
        for t in np.flatnonzero((slack < 0) | (multipliers > 0)):
            change = max(-multipliers[t], -slack[t] / projection[t, t])
            multipliers[t] += change
            slack += change * projection[t]
            largest = max(largest, abs(change) * projection[t, t])
        if largest <= 1e-6 * scale:
            break
    return y + slack - min(0.0, float(slack.min()))


@register(
    "range", "envelope", summary="polynomials over sigma around the smallest and largest values seen", over_time=True
)
def envelope(ranges: InputRanges, weight: Array, bits: int, degree: int = 4) -> ActivationTable:
    """Upper and lower envelope of degree ``degree``, fewer where there are fewer noise levels. ``weight`` is
    not used.
    """
    low, high = ranges.least.min(1), ranges.most.max(1)
    basis = np.polynomial.legendre.legvander(2 * ranges.sigma.astype(np.float64) - 1, min(degree, len(low) - 1))
    return affine_table(ranges.sigma, -upper_envelope(basis, -low), upper_envelope(basis, high), bits)
