"""How much to damp a Hessian: tried on some of the calibration tokens and judged on the others.

Damping trades error on the tokens that were seen for error on those that were not, and how much of it pays depends on
the layer: on how many tokens there are for its inputs and on how alike they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from ...errors import NumericsError
from ...numerics.arrays import Array
from ...numerics.moments import Moments, excess, shortfall

CANDIDATES = (0.003, 0.01, 0.03, 0.1, 0.3)  # of a rounding, relative to mean(diag H), as all methods take it
TARGETS = (1e-4, 1e-3, 1e-2, 1e-1)  # of a corrected target, in which there is no rounding noise to fit
ROWS = 128
QuantizeDamped = Callable[[Array, Moments, float], Array]


@dataclass(frozen=True)
class ChosenDamping:
    """A ``damping`` and, for each that was tried, the squared output error that it left on the held-out tokens, as
    ``moments.excess`` counts it: infinite where the Hessian was still singular.
    """

    damping: float
    errors: dict[float, float]


def choose_damping(
    weight: Array,
    quantize: QuantizeDamped,
    moments: Moments,
    candidates: Sequence[float] = CANDIDATES,
    rows: int = ROWS,
) -> ChosenDamping | None:
    """The damping among ``candidates`` with the least error on ``moments.held_out``, or None where no tokens are held
    out.

    ``quantize`` takes a weight [rows,in], moments and a damping, and returns the quantized weight [rows,in]: all that
    depends on the damping (corrected target, grid, codes), so that what is judged is what is stored. It is given the
    moments of the other tokens and at most ``rows`` evenly spaced rows of ``weight`` [out,in], which suffice for a
    mean. Where the moments have a cross term, errors are those against the full-precision model's outputs.
    """
    if moments.held_out is None:
        return None
    some = weight[np.linspace(0, len(weight) - 1, min(rows, len(weight))).astype(int)]
    training, judge = moments.training, moments.held_out
    missing = None if judge.cross is None else shortfall(some, judge)
    errors = {}
    for damping in candidates:
        try:
            errors[damping] = float(excess(some - quantize(some, training, damping), judge.gram, missing).sum())
        except NumericsError:  # too little for these inputs
            errors[damping] = inf
    return ChosenDamping(min(errors, key=lambda damping: errors[damping]), errors)
