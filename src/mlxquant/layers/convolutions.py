"""Convolutions with integer kernels: ``QuantizedConv2d`` and its siblings in one and three dimensions, transposed or
not.

MLX keeps every kernel as [out, ...window, in / groups], so a row of the packed weight is what makes one output channel,
flattened; the groups are the parts of the weight. MLX has no convolution on packed weights: the kernel is dequantized,
then convolved in the input's dtype, in float32 on the CPU. This saves memory at rest and in files, not time.

With a quantized input the patches are written out and multiplied, for MLX may compute a convolution of integers by
transforms that are not exact. The zeros that an input is padded with are zeros, whatever its shift: what the shift adds
to an output is the convolution of a constant picture with the same padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import AdapterError
from ..files import schema
from ..grids.time import Clock
from ..grids.weights import FORMAT, Grid, WeightFormat
from ..numerics.arrays import Array
from ..numerics.layer_inputs import LayerInputs
from ..numerics.low_rank import LowRank
from ..numerics.patches import Window, patches, spread_evenly
from .names import BIAS
from .own import Obstacle, OwnModule
from .packed import BRANCH_DTYPE, name_of, scale_dtype, stored_dtype
from .product import PRODUCT, QuantizedProduct
from .weight_only import rounded

POSITIONS = 512  # of a sample's outputs whose patches count in moments, evenly spread; neighbours are nearly alike
OPTIONS = ("stride", "padding", "dilation", "groups", "output_padding")


def _one_width(value: Any, where: str) -> None:
    """The schema of facts whose window has as many numbers as a row of the shape."""
    if prod(value["window"]) != value["shape"][1]:
        raise schema.MismatchError(f"{where}.window {value['window']} is not of shape {value['shape']}")


class QuantizedConvolution(QuantizedProduct):
    """A convolution of MLX with an integer kernel; ``convolve`` is the function of MLX that computes it.

    Args:
        codes: Codes of the kernel, uint8 [out, prod(window)].
        grid: The levels that the codes stand for.
        window: The kernel's shape without its first axis, (...places, in / groups).
        bias: What is added to each output channel [out], kept in its dtype; None for nothing.
        options: Those in ``OPTIONS`` that are not MLX's defaults, by name.
        branch: What is added to the integer kernel, never quantized, ``down`` of all groups one below the other; None
            for nothing.

    Raises:
        AdapterError: When the window or the branch does not fit the codes.
    """

    quantizes_inputs = True
    mixes_tokens = True

    convolve: ClassVar[Callable[..., mx.array]]
    _picture: tuple[tuple[int, ...], mx.array] | None
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
            PRODUCT,
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
        branch: LowRank | None = None,
    ):
        if codes.shape[1] != prod(window):
            raise AdapterError(f"codes of shape {codes.shape} do not fit kernels of shape {window}")
        super().__init__()
        dtypes = (None if bias is None else bias.dtype, stored_dtype(grid))
        self._lay_out(grid.format, (len(codes), *window), *dtypes, options or {})
        self._check_branch(branch)
        told = {} if branch is None else {"rank": branch.rank, BRANCH_DTYPE: name_of(self._branch_dtype(branch))}
        self._lay_out_product(told, None)
        self._fill(codes, grid, **{BIAS: bias, **self._factors(branch)})

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

    @classmethod
    def parts_of(cls, module: nn.Module) -> int:
        return int(getattr(module, "groups", 1))

    @classmethod
    def window_of(cls, module: nn.Module) -> Window:
        """Where a convolution of MLX puts its kernel."""
        return _window(cls, module.weight.shape, convolution_options(module))

    @classmethod
    def reads(cls, module: nn.Module) -> Any:
        return cls.window_of(module)

    @classmethod
    def read(cls, module: nn.Module, x: mx.array, *where: Any) -> LayerInputs:
        """Patches of at most ``POSITIONS`` outputs of each sample, a sample at a time, so that memory is bounded;
        extremes are those of the whole input, without the zeros of the padding.
        """
        window, x = cls.window_of(module), x.astype(mx.float32)
        outputs = prod(window.positions(x.shape[1:-1]))
        some = spread_evenly(outputs, POSITIONS)
        rows = np.stack([np.array(patches(sample[None], window, some)[0]) for sample in x])  # [N, S, groups, in]
        flat = np.asarray(x).reshape(len(x), -1, window.groups, x.shape[-1] // window.groups)
        low, high = (np.tile(v, (1, prod(window.size))) for v in (flat.min((1, 2)), flat.max((1, 2))))
        parts = [rows[:, :, part] for part in range(window.groups)]
        return LayerInputs(parts, low, high, share=len(some) / outputs)

    @classmethod
    def read_outputs(cls, module: nn.Module, outputs: mx.array, *call: Any) -> Array:
        return super().read_outputs(module, outputs)[:, spread_evenly(prod(outputs.shape[1:-1]), POSITIONS)]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        codes: Array,
        grid: Grid,
        divisor: mx.array | None = None,
        rotation: int = 1,
        branch: LowRank | None = None,
    ) -> QuantizedConvolution:
        return cls(codes, grid, module.weight.shape[1:], module.get(BIAS), convolution_options(module), branch)

    @property
    def parts(self) -> int:
        return int(self._options.get("groups", 1))

    @property
    def window(self) -> Window:
        """Where it puts its kernel."""
        return _window(type(self), self._shape, self._options)

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
        return kind(codes, grid, convolution.weight.shape[1:], convolution.get(BIAS), convolution_options(convolution))

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
            **self.product_facts,
            **({} if BIAS not in self or self[BIAS].dtype == mx.float32 else {"bias_dtype": name_of(self[BIAS].dtype)}),
        }

    @classmethod
    def blank(cls, facts: Mapping[str, Any], clock: Clock | None = None) -> Self:
        layer = cls._bare()
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in facts["options"].items()}
        shape = (facts["shape"][0], *facts["window"])
        bias = getattr(mx, facts.get("bias_dtype", "float32")) if facts["bias"] else None
        layer._lay_out(WeightFormat(**facts["format"]), shape, bias, scale_dtype(facts), options)
        layer._lay_out_product(facts, clock)
        return layer

    def differences(self, module: nn.Module) -> str | None:
        if (found := super().differences(module)) is None and convolution_options(module) != self._options:
            return f"which convolves with {self._options}, the model's with {convolution_options(module)}"
        return found

    def __call__(self, x: mx.array) -> mx.array:
        """x [N, ...places, in] to [N, ...places, out], in x's dtype."""
        return self.multiplied(x)

    def unrolled(self, x: mx.array) -> mx.array:
        return patches(x, self.window)  # [N, ...positions, groups, in]

    def meet(self, rows: mx.array, weight: mx.array, *where: Any) -> mx.array:
        if (groups := self.parts) == 1:
            return rows[..., 0, :] @ weight.T
        flat = rows.reshape(-1, groups, rows.shape[-1]).swapaxes(0, 1)
        y = flat @ weight.reshape(groups, -1, weight.shape[-1]).swapaxes(1, 2)
        return y.swapaxes(0, 1).reshape(*rows.shape[:-2], weight.shape[0])

    def product(self, x: mx.array, weight: mx.array, *where: Any) -> mx.array:
        kernel = weight.reshape(weight.shape[0], *self._shape[1:])
        return type(self).convolve(x, kernel.astype(x.dtype), **self._options)

    def sums(self, rows: mx.array) -> mx.array:
        return rows.sum(-1) if self.parts == 1 else mx.repeat(rows.sum(-1), self.rows // self.parts, axis=-1)

    def raised(self, h: mx.array, up: mx.array, *where: Any) -> mx.array:
        return self.meet(h.reshape(*h.shape[:-1], self.parts, -1), up)

    def ones(self, x: mx.array, *where: Any) -> mx.array:
        """The convolution of a constant picture, which is smaller where it is padded."""
        if self._picture is None or self._picture[0] != x.shape[1:]:
            picture = self.product(mx.ones((1, *x.shape[1:])), self.matrix())
            mx.eval(picture)
            self._picture = x.shape[1:], picture
        return self._picture[1]

    def refresh(self) -> None:
        super().refresh()
        self._picture = None

    @property
    def _runs_packed(self) -> bool:
        return False

    def _multiply(self, x: mx.array, *where: Any) -> mx.array:
        half = mx.default_device() != mx.cpu and self.reader is None
        return self.product(x if half else x.astype(mx.float32), self.matrix()).astype(mx.float32)

    def obstacles(self) -> list[Obstacle]:
        return [*OwnModule.obstacles(self), *(one for one in super().obstacles() if one.activations)]

    def _extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self._options.items())
        return f"{self._shape}, {self._format}{options}, bias={BIAS in self}"


def _window(kind: type[QuantizedConvolution], shape: Sequence[int], options: Mapping[str, Any]) -> Window:
    """That of a kernel [out, ...window, in / groups]."""
    place = Window.transposed if "Transpose" in kind.replaces.__name__ else Window.of
    return place(tuple(shape[1:-1]), **options)


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
