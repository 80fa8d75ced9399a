"""Convolutions with integer kernels: ``QuantizedConv2d`` and its siblings in one and three dimensions, transposed or
not.

MLX keeps every kernel as [out, ...window, in / groups], so a row of the packed weight is what makes one output channel,
flattened. MLX has no convolution on packed weights: the kernel is dequantized, then convolved in the input's dtype, in
float32 on the CPU. This saves memory at rest and in files, not time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError
from ..files import schema
from ..grids.time import Clock
from ..grids.weights import FORMAT, Grid, WeightFormat
from ..numerics.arrays import Array
from .names import BIAS
from .packed import SCALE_DTYPE, QuantizedLayer, scale_dtype, stored_dtype
from .weight_only import rounded

OPTIONS = ("stride", "padding", "dilation", "groups", "output_padding")


def _one_width(value: Any, where: str) -> None:
    """The schema of facts whose window has as many numbers as a row of the shape."""
    if prod(value["window"]) != value["shape"][1]:
        raise schema.MismatchError(f"{where}.window {value['window']} is not of shape {value['shape']}")


class QuantizedConvolution(QuantizedLayer):
    """A convolution of MLX with an integer kernel; ``convolve`` is the function of MLX that computes it.

    Args:
        codes: Codes of the kernel, uint8 [out, prod(window)].
        grid: The levels that the codes stand for.
        window: The kernel's shape without its first axis, (...places, in / groups).
        bias: What is added to each output channel [out], kept in its dtype; None for nothing.
        options: Those in ``OPTIONS`` that are not MLX's defaults, by name.

    Raises:
        AdapterError: When the window does not fit the codes.
    """

    convolve: ClassVar[Callable[..., mx.array]]
    STRUCTURE = schema.every(
        schema.entries(
            {
                "format": FORMAT,
                "shape": schema.array_of(schema.whole(1), 2, 2),
                "window": schema.array_of(schema.whole(1), 2, 4),
                "bias": schema.flag,
                "options": schema.table_of(
                    schema.either(schema.whole(), schema.array_of(schema.whole(), most=3)), keys=schema.one_of(*OPTIONS)
                ),
            },
            {SCALE_DTYPE: schema.floating},
        ),
        _one_width,
    )

    def __init__(
        self,
        codes: Array,
        grid: Grid,
        window: tuple[int, ...],
        bias: mx.array | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        if codes.shape[1] != prod(window):
            raise AdapterError(f"codes of shape {codes.shape} do not fit kernels of shape {window}")
        super().__init__()
        dtypes = (None if bias is None else bias.dtype, stored_dtype(grid))
        self._lay_out(grid.format, (len(codes), *window), *dtypes, options or {})
        self._fill(codes, grid, **{BIAS: bias})

    def _lay_out(
        self,
        format: WeightFormat,
        shape: Sequence[int],
        bias: mx.Dtype | None,
        scales: mx.Dtype,
        options: Mapping[str, Any],
    ) -> None:
        self._options = dict(options)
        self._lay_out_weight(format, shape, bias, scales)
        self.freeze()

    @classmethod
    def from_convolution(
        cls, convolution: nn.Module, format: WeightFormat, steps: str = "extremes"
    ) -> QuantizedConvolution:
        """What stands for ``convolution``, in the subclass that fits it.

        Args:
            convolution: The layer in full precision; it stays as it is.
            format: The grid's.
            steps: "extremes", so that nothing is clipped, or "mse", the step of the least squared error.

        Returns:
            The new layer, with the convolution's own bias and options.

        Raises:
            AdapterError: When there is none, or another than this.
            NumericsError: On NaN or infinite weights.
            RecipeError: When groups do not divide the flattened kernel.
        """
        kind = next((one for one in CONVOLUTIONS if isinstance(convolution, one.replaces)), None)
        if kind is None or not issubclass(kind, cls):
            raise AdapterError(f"{cls.__name__} does not stand for {type(convolution).__name__}")
        codes, grid = rounded(convolution.weight, format, steps)
        bias = convolution.bias if BIAS in convolution else None
        return kind(codes, grid, convolution.weight.shape[1:], bias, convolution_options(convolution))

    @property
    def options(self) -> dict[str, Any]:
        """What it convolves with, beside its kernel and its input."""
        return self._options

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "format": self._format.to_dict(),
            "shape": [self._shape[0], self.width],
            "window": list(self._shape[1:]),
            "bias": BIAS in self,
            "options": {
                name: list(value) if isinstance(value, tuple) else value for name, value in self._options.items()
            },
            **self.scale_facts,
        }

    @classmethod
    def blank(cls, facts: Mapping[str, Any], clock: Clock | None = None) -> Self:
        layer = cls._bare()
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in facts["options"].items()}
        shape, bias = (facts["shape"][0], *facts["window"]), mx.float32 if facts["bias"] else None
        layer._lay_out(WeightFormat(**facts["format"]), shape, bias, scale_dtype(facts), options)
        return layer

    def differences(self, module: nn.Module) -> str | None:
        if (found := super().differences(module)) is None and convolution_options(module) != self._options:
            return f"which convolves with {self._options}, the model's with {convolution_options(module)}"
        return found

    def __call__(self, x: mx.array) -> mx.array:
        """x [N, ...places, in] to [N, ...places, out], in x's dtype."""
        dtype = mx.float32 if mx.default_device() == mx.cpu else x.dtype
        y = type(self).convolve(x.astype(dtype), self.dequantized().astype(dtype), **self._options)
        return (y + self.bias.astype(dtype) if BIAS in self else y).astype(x.dtype)

    def _extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self._options.items())
        return f"{self._shape}, {self._format}{options}, bias={BIAS in self}"


def convolution_options(convolution: nn.Module) -> dict[str, Any]:
    """What a layer of MLX convolves with, beside its kernel and its input."""
    return {name: getattr(convolution, name) for name in OPTIONS if hasattr(convolution, name)}


class QuantizedConv1d(QuantizedConvolution):
    """``nn.Conv1d`` with an integer kernel. ``from_convolution`` makes one of a layer.

    Args:
        codes: Codes of the kernel, uint8 [out, prod(window)].
        grid: The levels that the codes stand for.
        window: The kernel's shape without its first axis, (width, in / groups).
        bias: What is added to each output channel [out], kept in its dtype; None for nothing.
        options: What the convolution is given beside its kernel, such as "stride", by name, where it is not MLX's
            default.
    """

    replaces, convolve = nn.Conv1d, mx.conv1d


class QuantizedConv2d(QuantizedConvolution):
    """``nn.Conv2d`` with an integer kernel. ``from_convolution`` makes one of a layer.

    Args:
        codes: Codes of the kernel, uint8 [out, prod(window)].
        grid: The levels that the codes stand for.
        window: The kernel's shape without its first axis, (height, width, in / groups).
        bias: What is added to each output channel [out], kept in its dtype; None for nothing.
        options: What the convolution is given beside its kernel, such as "stride", by name, where it is not MLX's
            default.
    """

    replaces, convolve = nn.Conv2d, mx.conv2d


class QuantizedConv3d(QuantizedConvolution):
    """``nn.Conv3d`` with an integer kernel; takes what ``QuantizedConvolution`` takes."""

    replaces, convolve = nn.Conv3d, mx.conv3d


class QuantizedConvTranspose1d(QuantizedConvolution):
    """``nn.ConvTranspose1d`` with an integer kernel; takes what ``QuantizedConvolution`` takes."""

    replaces, convolve = nn.ConvTranspose1d, mx.conv_transpose1d


class QuantizedConvTranspose2d(QuantizedConvolution):
    """``nn.ConvTranspose2d`` with an integer kernel; takes what ``QuantizedConvolution`` takes."""

    replaces, convolve = nn.ConvTranspose2d, mx.conv_transpose2d


class QuantizedConvTranspose3d(QuantizedConvolution):
    """``nn.ConvTranspose3d`` with an integer kernel; takes what ``QuantizedConvolution`` takes."""

    replaces, convolve = nn.ConvTranspose3d, mx.conv_transpose3d


CONVOLUTIONS: tuple[type[QuantizedConvolution], ...] = (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
