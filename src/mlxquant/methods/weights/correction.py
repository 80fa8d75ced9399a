"""The corrected target: weights that make up for what the layers before have already got wrong (Qronos, arXiv
2505.11695).

With X the full-precision model's inputs and X~ those of the partly quantized one, the best unquantized layer on X~ is

    W* = argmin_V ‖X Wᵀ − X~ Vᵀ‖² + λ ‖W − V‖²,   W*ᵀ = (H + λI)⁻¹ (G + λI) Wᵀ = Wᵀ + (H + λI)⁻¹ (G − H) Wᵀ

with H = X~ᵀX~ and G = X~ᵀX, and for any Q: ‖XW − X~Q‖² = ‖XW − X~W*‖² + ‖X~(W* − Q)‖² without damping. So the
correction is a target that any rounding method can inherit. The last form is the one computed: where both models see
the same it is W to the last digit.
"""

from __future__ import annotations

from ...numerics.arrays import Array
from ...numerics.cholesky import Factor
from ...numerics.moments import Moments, calibrated_gram, shortfall
from .gptq import damped_diagonal


def corrected_target(weight: Array, moments: Moments, damping: float = 1e-3) -> Array:
    """W* [out,in] for ``weight`` [out,in], in the precision of the gram matrix; ``damping`` is λ relative to mean(diag
    H).

    A dead column (H_jj = 0) keeps its weight. Takes the memory of one more gram matrix. Raises CalibrationError when
    the moments have no cross term, NumericsError when they are not finite or the damped H is singular.
    """
    gram = calibrated_gram(moments, weight.shape[1])
    missing = shortfall(weight, moments)
    return weight.astype(gram.dtype, copy=False) + Factor.of(gram, damped_diagonal(gram, damping)).solve(missing)
