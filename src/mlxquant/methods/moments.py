"""Second moments of a layer's inputs: all that a rounding method needs to know of the calibration data, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CalibrationError, NumericsError

Array = npt.NDArray[Any]
PANEL = 256  # columns of a gram matrix in a product; what is symmetric is computed once outside of them


class Moments:
    """``gram`` [in,in]: the sum of x~ x~ᵀ over ``count`` tokens x~ [in], the inputs of the partly quantized model.

    ``cross`` [in,in] is the sum of x~ xᵀ with x the same token's input in the full-precision model, for methods that correct the
    error of the layers before (Qronos, arXiv 2505.11695); None where only one stream was seen.

    The precision of the gram matrix, float32 or float64, is that of what is computed from it: products with it are most of a rounding
    method's work. An entry H_ij is only known to a few float32 roundings of √(H_ii H_jj), which is far below what damping adds.
    """

    def __init__(self, gram: Array, count: int, cross: Array | None = None):
        self._gram, self.count, self.cross = gram, count, cross
        self._mirrored = True

    @classmethod
    def empty(cls, width: int, dtype: npt.DTypeLike = np.float32) -> Moments:
        return cls(np.zeros((width, width), dtype), 0)

    @classmethod
    def of(cls, inputs: Array) -> Moments:
        """The moments of inputs [...,in], in their precision, at least float32."""
        moments = cls.empty(inputs.shape[-1], np.result_type(inputs, np.float32))
        moments.add(inputs)
        return moments

    @classmethod
    def identity(cls, width: int) -> Moments:
        """As if every input channel had been seen once, alone: methods then minimise the error of the weight itself."""
        return cls(np.eye(width), width)

    @property
    def gram(self) -> Array:
        if not self._mirrored:
            for start in range(0, self.width, PANEL):
                here, after = slice(start, start + PANEL), slice(start + PANEL, None)
                self._gram[after, here] = self._gram[here, after].T
                self._gram[here, here] = np.triu(self._gram[here, here]) + np.triu(self._gram[here, here], 1).T
            self._mirrored = True
        return self._gram

    @property
    def width(self) -> int:
        return int(self._gram.shape[0])

    def add(self, inputs: Array, exact: Array | None = None, weight: float = 1.0) -> None:
        """Add inputs [...,in], and the same tokens' ``exact`` inputs in the full-precision model where ``cross`` is wanted, in place.

        They count ``weight`` times. Raises NumericsError when they are not finite, CalibrationError on another width.
        """
        if inputs.shape[-1] != self.width:
            raise CalibrationError(f"inputs of shape {inputs.shape} do not belong to a layer of input width {self.width}")
        dtype = self._gram.dtype
        tokens = inputs.reshape(-1, self.width).astype(dtype, copy=False)
        power = np.einsum("ti,ti->i", tokens, tokens)
        if not np.isfinite(power).all():  # a NaN or infinity cannot hide from its square
            raise NumericsError(
                f"inputs of shape {inputs.shape} hold NaN or infinite values, first in channel {int(np.argmin(np.isfinite(power)))}; "
                "calibrate on inputs that the full-precision model can process"
            )
        reference = None if exact is None else exact.reshape(-1, self.width).astype(dtype, copy=False)
        if reference is not None and self.cross is None:
            self.cross = np.zeros_like(self._gram)
        for start in range(0, self.width, PANEL):
            here = slice(start, start + PANEL)
            panel = (tokens[:, here] * dtype.type(weight)).T
            self._gram[here, start:] += panel @ tokens[:, start:]  # the other half follows when it is asked for
            if reference is not None and self.cross is not None:
                self.cross[here] += panel @ reference
        self._mirrored = False
        self.count += len(tokens)

    def divided(self, divisor: Array) -> Moments:
        """The moments of inputs whose channels are divided by ``divisor`` [in]."""
        inverse = (1 / divisor).astype(self._gram.dtype)
        cross = None if self.cross is None else self.cross * inverse * inverse[:, None]
        return Moments(self.gram * inverse * inverse[:, None], self.count, cross)


def output_error(weight: Array, quantized: Array, moments: Moments) -> float:
    """Relative output error ‖X(W−Q)ᵀ‖ / ‖XWᵀ‖ of weights [out,in], from the gram matrix alone; 0 for equal weights."""
    noise = energy(weight - quantized, moments.gram).sum()
    signal = energy(weight, moments.gram).sum()
    if noise == 0:
        return 0.0
    return float(np.sqrt(noise / signal)) if signal > 0 else float("inf")


def energy(rows: Array, gram: Array) -> Array:
    """d H dᵀ of each row d of ``rows`` [out,in], H = ``gram`` symmetric: float64 [out], never negative.

    Computed in H's precision. What is left of H's diagonal and on it is enough, which saves half of the work.
    """
    rows = rows.astype(gram.dtype, copy=False)
    energies = np.zeros(len(rows))
    for start in range(0, len(gram), PANEL):
        here = slice(start, start + PANEL)
        product = rows[:, :start] @ gram[:start, here]
        product *= 2
        product += rows[:, here] @ gram[here, here]
        energies += np.einsum("oi,oi->o", product, rows[:, here])
    return np.maximum(energies, 0)


def calibrated_gram(moments: Moments | None, width: int) -> Array:
    """The gram matrix [in,in], for methods that cannot do without; CalibrationError when there is none or it does not fit."""
    if moments is None or moments.count == 0:
        raise CalibrationError("this method needs the moments of the layer's inputs; calibrate first, or use 'rtn'")
    if moments.width != width:
        raise CalibrationError(f"moments of {moments.width} inputs do not belong to a weight with {width} inputs")
    if not np.isfinite(moments.gram).all():
        raise NumericsError(f"the gram matrix of {width} inputs holds NaN or infinite values; calibrate again")
    return moments.gram
