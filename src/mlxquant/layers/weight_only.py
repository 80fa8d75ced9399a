"""A weight rounded without any data, and ``W8A16Linear``, which is made that way: 8-bit codes, one scale a row.

Scales and codes are computed in float32 and float64 whatever the weight's dtype: in bfloat16 the quotient of the
largest weight and its scale can round to 128, which wraps in int8. Our codes are clipped besides, so that they cannot
wrap in any dtype.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import AdapterError
from ..grids.weights import Grid, WeightFormat
from ..methods import registry
from ..numerics.arrays import Array
from .linear import QuantizedLinear

W8 = WeightFormat(8, "channel", symmetric=True)


def rounded(weight: mx.array, format: WeightFormat, steps: str = "extremes") -> tuple[Array, Grid]:
    """Codes uint8 [out,in], and their grid, of a weight [out,...] of any float dtype, its later axes taken as one.

    Args:
        weight: [out,...].
        format: The grid's.
        steps: A registered method that works without moments: "extremes" (nothing is clipped; a row of zeros gets scale
            1) or "mse".

    Returns:
        The codes and their grid.

    Raises:
        NumericsError: On NaN or infinity.
        RecipeError: When groups do not divide the width.
    """
    values = np.array(weight.astype(mx.float32)).reshape(weight.shape[0], -1)
    grid = registry.get("steps", steps).function(values, format, None)
    return registry.get("round", "rtn").function(values, grid, None), grid


class W8A16Linear(QuantizedLinear):
    """``y = (x W^T) scale + b`` with W in 8-bit codes; the input is not quantized, and the output has its dtype.

    It answers zero until it is given weights by ``quantize``.

    Args:
        in_features: Width of an input.
        out_features: Width of an output.
        bias: Whether it has a bias [out], float32 until one is given.

    Examples:
        >>> import mlx.core as mx
        >>> from mlxquant import W8A16Linear
        >>> quant_layer = W8A16Linear(in_features=512, out_features=256, bias=True)
        >>> original_weights = mx.random.normal((256, 512), key=mx.random.key(0))
        >>> layer = quant_layer.quantize(original_weights)
        >>> quant_layer.scales.shape, quant_layer.weight.nbytes
        ((256, 1), 131072)
        >>> quant_layer(mx.ones((4, 512), mx.bfloat16)).dtype
        mlx.core.bfloat16
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        codes = np.full((out_features, in_features), W8.zero_code, np.uint8)
        super().__init__(
            codes, Grid.symmetric(W8, np.ones((out_features, 1))), mx.zeros((out_features,)) if bias else None
        )

    def quantize(self, weight: mx.array | Array, bias: mx.array | None = None, steps: str = "extremes") -> W8A16Linear:
        """Take a weight, rounded to nearest with ``scale = max|row| / 127``, and the bias if one is given.

        Args:
            weight: [out,in], of any float dtype.
            bias: [out], kept in its dtype; None leaves the layer's own.
            steps: "extremes", so that nothing is clipped, or "mse", the step of the least squared error.

        Returns:
            The layer itself.

        Raises:
            AdapterError: On other shapes.
            NumericsError: On NaN or infinite weights.
        """
        weight = mx.array(weight)
        if weight.shape != self.shape:
            raise AdapterError(f"this layer takes a weight of shape {self.shape}, found {weight.shape}")
        if bias is not None and ("bias" not in self or bias.shape != self.shape[:1]):
            wanted = f"of shape {self.shape[:1]}" if "bias" in self else "not at all; make the layer with bias=True"
            raise AdapterError(f"this layer takes a bias {wanted}, found one of shape {bias.shape}")
        codes, grid = rounded(weight, W8, steps)
        fresh = QuantizedLinear(codes, grid)
        self.weight, self.scales = fresh.weight, fresh.scales
        if bias is not None:
            self.bias = bias
        self.refresh()
        return self

    @classmethod
    def from_linear(cls, linear: nn.Linear, steps: str = "extremes") -> W8A16Linear:
        """The layer that stands for ``linear``; its bias stays as it is.

        Args:
            linear: The layer in full precision; it stays as it is.
            steps: As ``quantize`` takes it.

        Returns:
            The new layer.

        Raises:
            NumericsError: On NaN or infinite weights.
        """
        rows, width = linear.weight.shape
        bias = linear.bias if "bias" in linear else None
        return cls(width, rows, bias is not None).quantize(linear.weight, bias, steps)


W8A16LinearLayer = W8A16Linear  # the name that quantizers in other frameworks gave it


def quantized_linear(linear: nn.Linear, format: WeightFormat, steps: str = "extremes") -> QuantizedLinear:
    """The layer that stands for ``linear`` in any format: a ``W8A16Linear`` where that is what the format says."""
    if format == W8:
        return W8A16Linear.from_linear(linear, steps)
    return QuantizedLinear(*rounded(linear.weight, format, steps), linear.bias if "bias" in linear else None)
