"""Second moments of a layer's inputs: all that a rounding method needs to know of the calibration data, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CalibrationError, NumericsError

Array = npt.NDArray[Any]


@dataclass
class Moments:
    """``gram`` [in,in] float64: the sum of x~ x~ᵀ over ``count`` tokens x~ [in], the inputs of the partly quantized model.

    ``cross`` [in,in] is the sum of x~ xᵀ with x the same token's input in the full-precision model, for methods that correct the
    error of the layers before (Qronos, arXiv 2505.11695); None where only one stream was seen.
    """

    gram: Array
    count: int
    cross: Array | None = None

    @classmethod
    def empty(cls, width: int) -> Moments:
        return cls(np.zeros((width, width)), 0)

    @classmethod
    def of(cls, inputs: Array) -> Moments:
        """The moments of inputs [...,in]."""
        moments = cls.empty(inputs.shape[-1])
        moments.add(inputs)
        return moments

    @classmethod
    def identity(cls, width: int) -> Moments:
        """As if every input channel had been seen once, alone: methods then minimise the error of the weight itself."""
        return cls(np.eye(width), width)

    @property
    def width(self) -> int:
        return int(self.gram.shape[0])

    def add(self, inputs: Array, exact: Array | None = None) -> None:
        """Add inputs [...,in], and the same tokens' ``exact`` inputs in the full-precision model where ``cross`` is wanted, in place.

        Raises NumericsError when they are not finite, CalibrationError on another width.
        """
        if inputs.shape[-1] != self.width:
            raise CalibrationError(f"inputs of shape {inputs.shape} do not belong to a layer of input width {self.width}")
        tokens = inputs.reshape(-1, self.width).astype(np.float64)
        gram = tokens.T @ tokens
        # a NaN or infinity cannot hide: its square is on the diagonal
        if not np.isfinite(np.diagonal(gram)).all():
            bad = int(np.flatnonzero(~np.isfinite(np.diagonal(gram)))[0])
            raise NumericsError(
                f"inputs of shape {inputs.shape} hold NaN or infinite values, first in channel {bad}; "
                "calibrate on inputs that the full-precision model can process"
            )
        self.gram += gram
        self.count += len(tokens)
        if exact is not None:
            cross = tokens.T @ exact.reshape(-1, self.width).astype(np.float64)
            self.cross = cross if self.cross is None else self.cross + cross

    def divided(self, divisor: Array) -> Moments:
        """The moments of inputs whose channels are divided by ``divisor`` [in]."""
        both = np.outer(divisor, divisor)
        return Moments(self.gram / both, self.count, None if self.cross is None else self.cross / both)


def output_error(weight: Array, quantized: Array, moments: Moments) -> float:
    """Relative output error ‖X(W−Q)ᵀ‖ / ‖XWᵀ‖ of weights [out,in], from the gram matrix alone; 0 for equal weights."""
    weight = weight.astype(np.float64)
    noise = energy(weight - quantized, moments.gram).sum()
    signal = energy(weight, moments.gram).sum()
    if noise == 0:
        return 0.0
    return float(np.sqrt(noise / signal)) if signal > 0 else float("inf")


def energy(rows: Array, gram: Array) -> Array:
    """d H dᵀ of each row d of ``rows`` [out,in]: float64 [out], never negative."""
    energies: Array = np.maximum(np.einsum("oi,oi->o", rows @ gram, rows), 0)
    return energies


def calibrated_gram(moments: Moments | None, width: int) -> Array:
    """The gram matrix [in,in], for methods that cannot do without; CalibrationError when there is none or it does not fit."""
    if moments is None or moments.count == 0:
        raise CalibrationError("this method needs the moments of the layer's inputs; calibrate first, or use 'rtn'")
    if moments.width != width:
        raise CalibrationError(f"moments of {moments.width} inputs do not belong to a weight with {width} inputs")
    if not np.isfinite(moments.gram).all():
        raise NumericsError(f"the gram matrix of {width} inputs holds NaN or infinite values; calibrate again")
    return moments.gram
