"""Convolutions with integer kernels: ``QuantizedConv2d`` and its siblings in one and three dimensions, transposed or
not.

MLX keeps every kernel as [out, ...window, in / groups], so a row of the packed weight is what makes one output channel,
flattened. MLX has no convolution on packed weights: the kernel is dequantized, then convolved in the input's dtype, in
float32 on the CPU. This saves memory at rest and in files, not time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..errors import AdapterError
from ..grids.packing import affine, dequantized, pack, unpack
from ..grids.weights import Grid, WeightFormat
from .weight_only import rounded

OPTIONS = ("stride", "padding", "dilation", "groups", "output_padding")


class QuantizedConvolution(nn.Module):
    """Parameters: ``weight`` uint32 [out, words], ``scales`` float16 [out or 1, groups], ``biases`` likewise on
    asymmetric grids, and ``bias`` [out] optional. ``replaces`` is the layer of MLX that a subclass stands for,
    ``convolve`` the function of MLX behind that.
    """

    replaces: ClassVar[type[nn.Module]]
    convolve: ClassVar[Callable[..., mx.array]]

    def __init__(
        self,
        codes: npt.NDArray[Any],
        grid: Grid,
        window: tuple[int, ...],
        bias: mx.array | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        """codes uint8 [out, prod(window)] on ``grid``; ``window`` is the kernel's shape without its first axis, and
        ``options`` those in ``OPTIONS`` that are not MLX's defaults. Raises AdapterError when the window does not fit
        the codes.
        """
        super().__init__()
        if codes.shape[1] != prod(window):
            raise AdapterError(f"codes of shape {codes.shape} do not fit kernels of shape {window}")
        self._format, self._window, self._options = grid.format, tuple(window), dict(options or {})
        rows = 1 if grid.format.group == "tensor" else len(codes)
        self.weight = mx.array(pack(codes, grid.format.bits))
        self.scales = mx.array(grid.scales[:rows].astype(np.float16))
        if not grid.format.symmetric:
            self.biases = mx.array(grid.biases[:rows].astype(np.float16))
        if bias is not None:
            self.bias = bias
        self.freeze()

    @classmethod
    def from_convolution(
        cls, convolution: nn.Module, format: WeightFormat, steps: str = "extremes"
    ) -> QuantizedConvolution:
        """What stands for ``convolution``, in the subclass that fits it.

        Raises AdapterError when there is none, or another than this, and what ``rounded`` raises.
        """
        kind = next((kind for kind in KINDS if isinstance(convolution, kind.replaces)), None)
        if kind is None or not issubclass(kind, cls):
            raise AdapterError(f"{cls.__name__} does not stand for {type(convolution).__name__}")
        codes, grid = rounded(convolution.weight, format, steps)
        bias = convolution.bias if "bias" in convolution else None
        return kind(codes, grid, convolution.weight.shape[1:], bias, convolution_options(convolution))

    @property
    def format(self) -> WeightFormat:
        return self._format

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, ...window, in / groups)"""
        return (self.weight.shape[0], *self._window)

    @property
    def options(self) -> dict[str, Any]:
        """What it convolves with, beside its kernel and its input."""
        return self._options

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored in place of the kernel: codes, scales and biases."""
        return sum(self[name].nbytes for name in ("weight", "scales", "biases") if name in self)

    @property
    def facts(self) -> dict[str, Any]:
        """The layer's structure as plain data: what ``blank`` needs to rebuild it."""
        return {
            "format": self._format.to_dict(),
            "shape": [self.weight.shape[0], prod(self._window)],
            "window": list(self._window),
            "bias": "bias" in self,
            "options": {
                name: list(value) if isinstance(value, tuple) else value for name, value in self._options.items()
            },
        }

    @classmethod
    def blank(cls, facts: Mapping[str, Any], clock: None = None) -> QuantizedConvolution:
        """A layer of the structure that ``facts`` describes, to be filled with ``load_weights``."""
        format, (rows, width) = WeightFormat(**facts["format"]), facts["shape"]
        units = np.ones((rows, width // format.columns(width)))
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in facts["options"].items()}
        bias = mx.zeros((rows,)) if facts["bias"] else None
        return cls(np.zeros((rows, width), np.uint8), Grid(format, units, units), tuple(facts["window"]), bias, options)

    def refresh(self) -> None:
        """Nothing is kept beside the parameters."""

    def codes(self) -> npt.NDArray[Any]:
        """The kernel's codes, uint8 [out, prod(window)]."""
        return unpack(np.array(self.weight), self._format.bits, prod(self._window))

    def dequantized(self) -> mx.array:
        """The kernel as float32 [out, ...window, in / groups]."""
        return dequantized(self.weight, *affine(self, self._format), self._format.bits, prod(self._window)).reshape(
            self.shape
        )

    def __call__(self, x: mx.array) -> mx.array:
        """x [N, ...places, in] to [N, ...places, out], in x's dtype."""
        dtype = mx.float32 if mx.default_device() == mx.cpu else x.dtype
        y = type(self).convolve(x.astype(dtype), self.dequantized().astype(dtype), **self._options)
        return (y + self.bias.astype(dtype) if "bias" in self else y).astype(x.dtype)

    def _extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self._options.items())
        return f"{self.shape}, {self._format}{options}, bias={'bias' in self}"


def convolution_options(convolution: nn.Module) -> dict[str, Any]:
    """What a layer of MLX convolves with, beside its kernel and its input."""
    return {name: getattr(convolution, name) for name in OPTIONS if hasattr(convolution, name)}


class QuantizedConv1d(QuantizedConvolution):
    replaces, convolve = nn.Conv1d, mx.conv1d


class QuantizedConv2d(QuantizedConvolution):
    replaces, convolve = nn.Conv2d, mx.conv2d


class QuantizedConv3d(QuantizedConvolution):
    replaces, convolve = nn.Conv3d, mx.conv3d


class QuantizedConvTranspose1d(QuantizedConvolution):
    replaces, convolve = nn.ConvTranspose1d, mx.conv_transpose1d


class QuantizedConvTranspose2d(QuantizedConvolution):
    replaces, convolve = nn.ConvTranspose2d, mx.conv_transpose2d


class QuantizedConvTranspose3d(QuantizedConvolution):
    replaces, convolve = nn.ConvTranspose3d, mx.conv_transpose3d


KINDS: tuple[type[QuantizedConvolution], ...] = (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
