"""``FakeQuantLinear``: one layer that calibrates itself, then computes in floats what it would as integers (TCAQ-DM).

Timestep-channel joint reparameterization (arXiv 2412.16700, equations 3 to 5) for a layer that is used by itself,
without a model, a recipe or a sweep: feed it batches with their timesteps, ``freeze`` it, and use it. It is a
simulation: activation steps, one for each channel, cannot leave an integer matmul, and they cancel the
reparameterization, of which only a harder weight is left. A model is quantized by ``tcaq`` recipes, whose layers have
one step for the tensor.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import AdapterError, CalibrationError, NumericsError, RecipeError
from ..files import schema
from ..files.checked import read_tensors, understood, write_tensors
from ..files.parameters import load_parameters
from ..grids.weights import WeightFormat, fit_extremes
from ..methods.transforms.tcaq import joint_ratios
from .own import OwnModule
from .tree import parameters

KIND = "fake-quant-linear"
STATISTICS = ("timesteps", "low", "high", "ratio", "frozen")

HEADER = schema.entries(
    {
        "layer": schema.entries(
            {
                "in_features": schema.whole(1),
                "out_features": schema.whole(1),
                "bias": schema.flag,
                "dtype": schema.floating,
                "R_trunc": schema.number(1),
                "weight_bits": schema.whole(2, 8),
                "activation_bits": schema.whole(2, 8),
            }
        )
    }
)


class FakeQuantLinear(OwnModule):
    """``y = x W^T + b``: exact and watching until ``freeze``, fake quantized afterwards.

    Parameters: ``weight`` [out,in] and ``bias`` [out] in ``dtype``; ``timesteps`` [T] ascending, ``low`` and ``high``
    [T,in], the least and the largest input of each channel, ``ratio`` [in], all float32, and ``frozen`` uint8. Only the
    first two are trainable. ``freeze`` replaces the weight by the fake quantized ``W diag(ratio)``, so a layer is
    frozen once: who wants to calibrate again starts from the linear layer (``from_linear``). All that is known is in
    the parameters, and goes where they go: ``save`` and ``load``, or a model's own ``save_weights`` and, because the
    number of timesteps is not known before, ``load_weights(file, strict=False)``.

    Args:
        in_features: Width of an input.
        out_features: Width of an output.
        bias: Whether it has a bias.
        dtype: A floating dtype, of the weight and of outputs.
        R_trunc: The most that a channel may be divided by (equation 5), at least 1; the paper has 10.
        weight_bits: Bits of a weight, 2 to 8.
        activation_bits: Bits of an input, 2 to 8.

    Raises:
        RecipeError: On bits, a truncation or widths outside of these limits, or a dtype that is not floating.

    Examples:
        >>> import mlx.core as mx
        >>> from mlxquant import FakeQuantLinear
        >>> fq = FakeQuantLinear(in_features=512, out_features=256, bias=True, dtype=mx.float16, R_trunc=10.0)
        >>> for t in range(15):  # calibration: every timestep with inputs of its own
        ...     _ = fq(mx.random.normal((8, 512), key=mx.random.key(t)) * (t + 1), timestamp=t)
        >>> fq.freeze()
        >>> y = fq(mx.random.normal((8, 512), key=mx.random.key(99)), timestamp=3)
        >>> y.shape, y.dtype
        ((8, 256), mlx.core.float16)
        >>> scale, zero_point = fq.get_activation_qparams(timestamp=3.5)  # between two calibrated timesteps
        >>> scale.shape, zero_point.dtype
        ((512,), mlx.core.int32)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: mx.Dtype = mx.float32,
        R_trunc: float = 10.0,
        *,
        weight_bits: int = 8,
        activation_bits: int = 8,
    ):
        super().__init__()
        if not all(isinstance(width, int | np.integer) and width >= 1 for width in (in_features, out_features)):
            raise RecipeError(
                f"in_features and out_features must be whole numbers of at least 1, found {in_features!r} and"
                f" {out_features!r}"
            )
        if not (isinstance(dtype, mx.Dtype) and mx.issubdtype(dtype, mx.floating)):
            raise RecipeError(f"dtype must be one of mx.float32, mx.float16 and mx.bfloat16, found {dtype!r}")
        if not 2 <= activation_bits <= 8:
            raise RecipeError(f"activation bits must be 2 to 8, found {activation_bits}")
        if not (math.isfinite(R_trunc) and R_trunc >= 1):
            raise RecipeError(f"R_trunc must be a number of at least 1, found {R_trunc}; the paper has 10")
        self._format = WeightFormat(weight_bits, "channel", symmetric=False)
        self._activation_bits, self._r_trunc = activation_bits, float(R_trunc)
        linear = nn.Linear(in_features, out_features, bias)
        self.weight = linear.weight.astype(dtype)
        if bias:
            self.bias = linear.bias.astype(dtype)
        self.timesteps = mx.zeros((0,))
        self.low, self.high = mx.zeros((0, in_features)), mx.zeros((0, in_features))
        self.ratio = mx.ones((in_features,))
        self.frozen = mx.array(0, mx.uint8)
        super().freeze(keys=list(STATISTICS))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, R_trunc: float = 10.0, *, weight_bits: int = 8, activation_bits: int = 8
    ) -> FakeQuantLinear:
        """A layer with the weight and the bias of another, in its dtype.

        Args:
            linear: The layer in full precision; it stays as it is.
            R_trunc: As the constructor takes it.
            weight_bits: Bits of a weight, 2 to 8.
            activation_bits: Bits of an input, 2 to 8.

        Returns:
            The new layer, not calibrated yet.

        Raises:
            RecipeError: As the constructor does.
        """
        rows, width = linear.weight.shape
        has_bias = "bias" in linear
        layer = cls(
            width,
            rows,
            has_bias,
            linear.weight.dtype,
            R_trunc,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
        )
        layer.weight = linear.weight
        if has_bias:
            layer.bias = linear.bias
        return layer

    @property
    def is_frozen(self) -> bool:
        return bool(self.frozen.item())

    def __call__(self, x: mx.array, timestamp: float) -> mx.array:
        """x [...,in] at a timestep to [...,out] in the layer's dtype.

        Args:
            x: Inputs [...,in] of any float dtype.
            timestamp: The timestep that they are of, one finite number for all.

        Raises:
            AdapterError: On another width, or what is no MLX array.
            CalibrationError: On a timestep that is no finite number.
            NumericsError: While it calibrates, on NaN or infinite inputs.
        """
        if not isinstance(x, mx.array) or not x.ndim:
            raise AdapterError(
                f"this layer takes mx.array of [..., {self.weight.shape[1]}], found {type(x).__name__}; convert it by"
                " mx.array"
            )
        if x.shape[-1] != self.weight.shape[1]:
            raise AdapterError(f"this layer takes inputs of width {self.weight.shape[1]}, found {x.shape[-1]}")
        values, time = x.astype(mx.float32), self._time(timestamp)
        if self.is_frozen:
            values = self._represented(values / self.ratio, time)
        elif x.size:
            self._watch(values.reshape(-1, x.shape[-1]), time)
        y = values @ self.weight.astype(mx.float32).T
        return (y + self.bias.astype(mx.float32) if "bias" in self else y).astype(self.weight.dtype)

    def freeze(self) -> None:  # type: ignore[override]  # ends calibration; nn.Module's own is about training
        """End the calibration: divide the inputs' channels by their joint ratio, and round the weight that stands for
        that.

        Raises:
            CalibrationError: When nothing was calibrated, or when the layer is frozen already.
        """
        if self.is_frozen:
            raise CalibrationError(
                "this layer is frozen already; to calibrate again, start from the linear layer with from_linear"
            )
        if self.timesteps.size == 0:
            raise CalibrationError("freeze needs calibration; call the layer on inputs of every timestep first")
        peaks = np.maximum(np.abs(np.array(self.low)), np.abs(np.array(self.high)))
        ratio = joint_ratios(peaks, self._r_trunc)
        weight = np.array(self.weight.astype(mx.float32)) * ratio
        grid = fit_extremes(weight, self._format)
        self.weight = mx.array(grid.dequantize(grid.quantize(weight))).astype(self.weight.dtype)
        self.ratio, self.frozen = mx.array(ratio), mx.array(1, mx.uint8)

    def get_activation_qparams(self, timestamp: float) -> tuple[mx.array, mx.array]:
        """Scale float32 [in] > 0 and zero point int32 [in] of ``x / ratio``: ``q = clip(round(x / ratio / scale) +
        zero, 0, 2^bits - 1)``.

        The range that they span contains 0. Between two calibrated timesteps it is interpolated, outside of them the
        nearest holds.

        Args:
            timestamp: The timestep, one finite number.

        Returns:
            The scale and the zero point.

        Raises:
            CalibrationError: Before ``freeze``, and on a timestep that is no finite number.
        """
        if not self.is_frozen:
            raise CalibrationError("activation scales are known when the calibration has ended; call freeze first")
        low, high = (ends / self.ratio for ends in self._ends(self._time(timestamp)))
        span = high - low
        scale = mx.where(span > 0, span / (2**self._activation_bits - 1), 1.0)
        return scale, mx.round(-low / scale).astype(mx.int32)

    def save(self, path: str | Path) -> None:
        """Write the layer as one safetensors file, calibrated as far as it is.

        Args:
            path: The file.

        Raises:
            ArtifactError: Where that fails.
        """
        write_tensors(Path(path), KIND, parameters(self), {"layer": self._facts})

    @classmethod
    def load(cls, path: str | Path) -> FakeQuantLinear:
        """What ``save`` wrote.

        Args:
            path: The file.

        Returns:
            The layer.

        Raises:
            ArtifactError: On a missing, damaged or foreign file.
        """
        arrays, header = read_tensors(Path(path), KIND, schema=HEADER)
        with understood(Path(path), "save the layer again"):
            facts = header["layer"]
            layer = cls(**{**facts, "dtype": getattr(mx, facts["dtype"])})
            count, width = arrays["low"].shape
        layer.timesteps, layer.low, layer.high = mx.zeros((count,)), mx.zeros((count, width)), mx.zeros((count, width))
        load_parameters(layer, arrays, str(path))
        return layer

    @property
    def _facts(self) -> dict[str, Any]:
        """The arguments that make a layer of this structure."""
        rows, width = self.weight.shape
        return {
            "in_features": width,
            "out_features": rows,
            "bias": "bias" in self,
            "dtype": str(self.weight.dtype).removeprefix("mlx.core."),
            "R_trunc": self._r_trunc,
            "weight_bits": self._format.bits,
            "activation_bits": self._activation_bits,
        }

    def _time(self, timestamp: float) -> float:
        try:
            time = np.asarray(timestamp, np.float32)
        except (TypeError, ValueError):
            time = np.full(1, np.nan, np.float32)
        if time.size != 1 or not np.isfinite(time).all():
            raise CalibrationError(
                f"a timestep is one finite number, found {timestamp!r}; call the layer once for each timestep"
            )
        return float(time.reshape(()))

    def _watch(self, x: mx.array, time: float) -> None:
        """Widen the ranges at a timestep by inputs [N,in], always those that come in: never x / ratio."""
        low, high = x.min(0), x.max(0)
        if not mx.isfinite(low + high).all().item():
            raise NumericsError(f"the input at timestep {time:g} holds NaN or infinite values")
        times = np.array(self.timesteps)
        place = int(np.searchsorted(times, np.float32(time)))
        known = place < len(times) and times[place] == np.float32(time)
        if known:
            low, high = mx.minimum(self.low[place], low), mx.maximum(self.high[place], high)
        rest = place + 1 if known else place
        self.timesteps = mx.concatenate([self.timesteps[:place], mx.array([time]), self.timesteps[rest:]])
        self.low = mx.concatenate([self.low[:place], low[None], self.low[rest:]])
        self.high = mx.concatenate([self.high[:place], high[None], self.high[rest:]])
        mx.eval(self.low, self.high, self.timesteps)  # now, so that the inputs can go

    def _ends(self, time: float) -> tuple[mx.array, mx.array]:
        """The range of x at a timestep [in], with 0 in it."""
        times = np.array(self.timesteps)
        position = float(np.interp(time, times, np.arange(len(times))))
        before, after, part = math.floor(position), math.ceil(position), position % 1
        low, high = mx.minimum(self.low, 0), mx.maximum(self.high, 0)
        return (1 - part) * low[before] + part * low[after], (1 - part) * high[before] + part * high[after]

    def _represented(self, x: mx.array, time: float) -> mx.array:
        """``x / ratio`` as the codes at a timestep represent it."""
        scale, zero = self.get_activation_qparams(time)
        codes = mx.clip(mx.round(x / scale) + zero, 0, 2**self._activation_bits - 1)
        return (codes - zero) * scale
