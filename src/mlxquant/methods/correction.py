"""The corrected target: weights that make up for what the layers before have already got wrong (Qronos, arXiv 2505.11695).

With X the full-precision model's inputs and X~ those of the partly quantized one, the best unquantized layer on X~ is

    W* = argmin_V ||X W^T - X~ V^T||^2 + damping ||W - V||^2,   W*^T = (H + damping I)^-1 (G + damping I) W^T

with H = X~^T X~ and G = X~^T X, and for any Q: ||XW - X~Q||^2 = ||XW - X~W*||^2 + ||X~(W* - Q)||^2 without damping. So the correction
is a target that any rounding method can inherit. Our departure: Qronos interleaves the correction with the rounding of the first
column; aiming GPTQ at W* ties or beats that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CalibrationError, NumericsError
from .moments import Moments, calibrated_gram

Array = npt.NDArray[Any]


def corrected_target(weight: Array, moments: Moments, damping: float = 1e-3) -> Array:
    """W* [out,in] float64 for ``weight`` [out,in]; ``damping`` is relative to mean(diag H).

    Raises CalibrationError when the moments have no cross term, NumericsError when the damped H is singular.
    """
    gram = calibrated_gram(moments, weight.shape[1])
    if moments.cross is None:
        raise CalibrationError("a corrected target needs the inputs of both streams; collect moments with their cross term")
    width = weight.shape[1]
    ridge = damping * float(np.diagonal(gram).mean()) * np.eye(width)
    try:
        return np.linalg.solve(gram + ridge, (moments.cross + ridge) @ weight.astype(np.float64).T).T
    except np.linalg.LinAlgError as error:
        raise NumericsError(f"the Hessian of {width} inputs is singular; use more damping or more calibration tokens") from error
