"""Coordinate descent on the codes: what a greedy pass has left, picked up one column at a time (arXiv 2309.01885)."""

from __future__ import annotations

import numpy as np

from ...grids.weights import Grid
from ...numerics.arrays import Array
from ...numerics.cholesky import Factor
from ...numerics.moments import Moments, calibrated_gram
from ..registry import Citation, register
from .gptq import damped_problem, nearest_plane
from .rtn import better_rows, rtn

QUANTEASE = Citation(
    "quantease",
    """@article{behdin2023quantease,
  title = {{QuantEase}: Optimization-based Quantization for Language Models},
  author = {Behdin, Kayhan and Acharya, Ayan and Gupta, Aman and Song, Qingquan
            and Zhu, Siyu and Keerthi, Sathiya and Mazumder, Rahul},
  journal = {arXiv preprint arXiv:2309.01885},
  year = {2023}
}""",
)


@register("round", "gptq-descent", citation=QUANTEASE, summary="GPTQ, then coordinate descent on its codes")
def gptq_descent(
    weight: Array, grid: Grid, moments: Moments | None, *, damping: float = 0.01, passes: int = 4, block: int = 128
) -> Array:
    """GPTQ's codes, descended: uint8 [out,in]. Arguments, guard and errors as for ``gptq``; ``passes`` as for
    ``descend``.

    Descends on the damped H: on calibration data it ends where the plain H would, on held-out data lower.
    """
    gram = calibrated_gram(moments, weight.shape[1])
    target, hessian = damped_problem(weight, gram, damping)
    nearest = rtn(target, grid)
    codes = descend(target, grid, nearest_plane(target, grid, Factor.of(hessian)), hessian, passes=passes, block=block)
    return better_rows(target, grid, codes, nearest, gram)


def descend(weight: Array, grid: Grid, codes: Array, hessian: Array, *, passes: int = 4, block: int = 128) -> Array:
    """Codes uint8 [out,in] with no more error d H dᵀ, d = w − q, in any row than ``codes`` had; ``hessian`` is H
    [in,in].

    In cyclic passes each column takes the codes that minimise the error with all others fixed, q_j + (DH)_j / H_jj
    rounded to the grid, until a pass changes nothing or ``passes`` are done. The gradient DH is formed for ``block``
    columns at a time and kept up to date inside the block. Columns with H_jj = 0 keep their codes. Computed in the
    precision of ``hessian``.

    Source: 2309.01885, algorithm 1 (QuantEase), which starts from the unrounded weight; from GPTQ's codes it needs
    fewer passes.
    """
    width = weight.shape[1]
    group = np.arange(width) // grid.format.columns(width)
    scales, biases = (np.ascontiguousarray(v.T, hessian.dtype) for v in (grid.scales, grid.biases))
    codes = codes.T.copy()
    error = weight.T.astype(hessian.dtype) - (codes * scales[group] + biases[group])
    for _ in range(passes):
        before = codes.copy()
        for start in range(0, width, block):
            stop = min(start + block, width)
            inside = hessian[start:stop, start:stop]
            gradient = hessian[start:stop] @ error
            moved = np.zeros_like(gradient)
            for k, j in enumerate(range(start, stop)):
                if hessian[j, j] == 0:
                    continue
                scale, bias = scales[group[j]], biases[group[j]]
                value = codes[j] * scale + bias
                wanted = value + (gradient[k] - inside[k, :k] @ moved[:k]) / hessian[j, j]
                codes[j] = np.clip(np.rint((wanted - bias) / scale), 0, grid.format.levels - 1)
                moved[k] = codes[j] * scale + bias - value
            error[start:stop] -= moved
        if np.array_equal(codes, before):
            break
    return np.ascontiguousarray(codes.T)
