"""An integer weight where it is stored: what all quantized layers have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import RecipeError
from ..grids.packing import dequantized, pack, unpack
from ..grids.weights import GROUPS, Grid, WeightFormat
from ..numerics.arrays import Array
from ..numerics.layer_inputs import LayerInputs
from ..numerics.low_rank import LowRank
from .names import BIAS, BIASES, DIVISOR, FOR_WEIGHT, INTEGERS, SCALES, WEIGHT
from .own import QuantizedModule
from .tree import parameters

SCALE_DTYPE, BRANCH_DTYPE = "scale_dtype", "branch_dtype"  # in ``facts``, where they are not float16


def name_of(dtype: mx.Dtype) -> str:
    """Such as "float16"."""
    return str(dtype).removeprefix("mlx.core.")


def stored_dtype(grid: Grid) -> mx.Dtype:
    """In what a layer stores scales and biases of a grid."""
    dtype: mx.Dtype = getattr(mx, np.dtype(grid.dtype).name)
    return dtype


def scale_dtype(facts: Mapping[str, Any]) -> mx.Dtype:
    """That of scales and biases in a layer of these facts."""
    dtype: mx.Dtype = getattr(mx, facts.get(SCALE_DTYPE, "float16"))
    return dtype


def weight_bytes(parts: Mapping[str, Any]) -> int:
    """Bytes of those of a layer's arrays, by name, that are stored in place of its weight."""
    return sum(parts[name].nbytes for name in (*FOR_WEIGHT, DIVISOR) if name in parts)


def check_parts(format: WeightFormat, parts: int) -> None:
    """Raise RecipeError on one scale for a tensor of several parts, which are rounded one by one."""
    if format.group == "tensor" and parts > 1:
        raise RecipeError(
            f"format {format}: one scale for a tensor of {parts} parts (groups of channels, or experts), which are"
            " rounded one by one; use a scale a row, or a group"
        )


class QuantizedLayer(QuantizedModule):
    """A layer with an integer weight, which stands in the place of one of MLX's, ``replaces``.

    Parameters: ``weight`` uint32 [rows, words], ``scales`` [rows or 1, groups], ``biases`` likewise on asymmetric
    grids, and ``bias`` optional, a number for each row. Scales and biases are float16, or float32 where that is too
    small (``Grid.dtype``). A row of codes is what makes one output, its other axes flattened. The rows are one matrix,
    or ``parts`` of them of equal height, one below the other: each group of a convolution's channels, each expert of a
    switch layer reads an input of its own.

    A kind of layers is a subclass and a line in ``kinds``. It says of a module that it can stand for, which is still in
    full precision, what everything else asks: ``matrix_of`` its weight, ``parts_of`` it, what a call of it reads
    (``read``), how many ``outputs`` it writes; and makes one ``of`` it.
    """

    replaces: ClassVar[type[nn.Module]]
    quantizes_inputs: ClassVar[bool] = False  # whether what it reads can be quantized
    transforms_inputs: ClassVar[bool] = False  # whether it can divide, rotate or shift the channels of what it reads
    meets_one_part: ClassVar[bool] = False  # whether a token meets one part of the weight alone
    pairs_streams: ClassVar[bool] = True  # whether the exact model reads the same tokens in the same places
    tells_outputs: ClassVar[bool] = True  # whether it can say which output was made of which row that it reads

    @classmethod
    def is_plain(cls, module: nn.Module) -> bool:
        """Whether a module computes what the class that this ``replaces`` does, from a weight and a bias alone."""
        same = all(
            getattr(type(module), name, None) is getattr(cls.replaces, name, None) for name in ("__call__", "as_linear")
        )
        return same and WEIGHT in module and set(parameters(module)) <= {WEIGHT, BIAS}

    @classmethod
    def parts_of(cls, module: nn.Module) -> int:
        """Of how many parts a module's weight is."""
        return 1

    @classmethod
    def outputs(cls, module: nn.Module) -> int:
        """How many numbers a module writes for a token."""
        return int(module.weight.shape[0])

    @classmethod
    def matrix_of(cls, module: nn.Module) -> mx.array:
        """A module's weight [rows, in], in its dtype."""
        weight: mx.array = module.weight
        return weight.reshape(-1, cls.width_of(weight.shape))

    @classmethod
    def width_of(cls, shape: Sequence[int]) -> int:
        """Numbers in a row of a weight of this shape."""
        return prod(shape[1:])

    @classmethod
    def reads(cls, module: nn.Module) -> Any:
        """What layers that are given the same arrays must have in common to read the same rows."""
        return cls

    @classmethod
    def read(cls, module: nn.Module, x: mx.array, *where: Any) -> LayerInputs:
        """What a module reads when it is called so."""
        raise NotImplementedError

    @classmethod
    def read_outputs(cls, module: nn.Module, outputs: mx.array, *call: Any) -> Array:
        """Of an array in the shape of what a module answers when it is called so, what belongs to the rows of ``read``:
        float32 [samples, tokens, out].
        """
        return np.asarray(outputs.astype(mx.float32)).reshape(outputs.shape[0], -1, outputs.shape[-1])

    @classmethod
    def of(
        cls,
        module: nn.Module,
        codes: Array,
        grid: Grid,
        divisor: mx.array | None = None,
        rotation: int = 1,
        branch: LowRank | None = None,
    ) -> Any:
        """The layer with these codes uint8 [rows, in] that stands for a module; all else it has of the module.

        ``divisor`` and ``rotation`` are what it does to its input, as in ``QuantizedLinear``.
        """
        raise NotImplementedError

    def _lay_out_weight(
        self, format: WeightFormat, shape: Sequence[int], bias: mx.Dtype | None, scales: mx.Dtype
    ) -> None:
        """The parameters of a weight of this shape, in their shapes and dtypes, zero and not evaluated.

        Raises RecipeError where groups do not divide the width.
        """
        self._format, self._shape = format, tuple(shape)
        rows, width = self.rows, self.width
        groups = (1 if format.group == "tensor" else rows, width // format.columns(width))
        self[WEIGHT] = mx.zeros((rows, -(-width * format.bits // 32)), mx.uint32)
        self[SCALES] = mx.zeros(groups, scales)
        if not format.symmetric:
            self[BIASES] = mx.zeros(groups, scales)
        if bias is not None:
            self[BIAS] = mx.zeros(self._bias_shape, bias)

    def _fill(self, codes: Array, grid: Grid, **others: mx.array | None) -> None:
        """Take codes uint8 [out, in] on ``grid``, and other parameters, those that are there, by name."""
        rows, dtype = self[SCALES].shape[0], grid.dtype
        values = {
            WEIGHT: mx.array(pack(codes, grid.format.bits)),
            SCALES: mx.array(grid.scales[:rows].astype(dtype)),
            BIASES: None if grid.format.symmetric else mx.array(grid.biases[:rows].astype(dtype)),
            **others,
        }
        self.load_weights([(name, value) for name, value in values.items() if value is not None])

    @property
    def format(self) -> WeightFormat:
        return self._format

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight which it stands for: (out, in), (out, ...window, in / groups) or (experts, out, in)."""
        return self._shape

    @property
    def width(self) -> int:
        """Codes in a row of the weight."""
        return self.width_of(self._shape)

    @property
    def rows(self) -> int:
        """Rows of the weight, those of all parts."""
        return self._shape[0]

    @property
    def parts(self) -> int:
        """Of how many parts the weight is."""
        return 1

    @property
    def _bias_shape(self) -> tuple[int, ...]:
        return (self.rows,)

    @property
    def scale_facts(self) -> dict[str, str]:
        """What ``facts`` say of scales and biases: their dtype, where it is not float16."""
        dtype = name_of(self[SCALES].dtype)
        return {} if dtype == "float16" else {SCALE_DTYPE: dtype}

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored in place of the weight: codes, scales and biases, the input's divisor, the branch."""
        return weight_bytes(self)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each number of the weight."""
        return 8 * self.nbytes / prod(self._shape)

    def codes(self) -> Array:
        """The weight's codes, uint8 [out, in]."""
        return unpack(np.array(self[WEIGHT]), self._format.bits, self.width)

    def grid(self) -> Grid:
        """The levels of each row, scales and biases float32 [out, groups]."""
        rows, scales = self.rows, np.array(self[SCALES]).astype(np.float32)
        biases = np.array(self[BIASES]).astype(np.float32) if BIASES in self else -self._format.zero_code * scales
        return Grid(self._format, *(np.broadcast_to(v, (rows, v.shape[1])) for v in (scales, biases)))

    def scales_and_biases(self) -> tuple[mx.array, mx.array]:
        """What a code is multiplied by and what is added, float32 [out or 1, groups]: the biases of a symmetric grid
        follow from its scales.
        """
        scales = self[SCALES].astype(mx.float32)
        return scales, self[BIASES].astype(mx.float32) if BIASES in self else scales * -self._format.zero_code

    def dequantized(self) -> mx.array:
        """The integer weight as float32 in its ``shape``."""
        return self.matrix().reshape(self._shape)

    def matrix(self) -> mx.array:
        """The integer weight float32 [rows, in]."""
        return dequantized(self[WEIGHT], *self.scales_and_biases(), self._format.bits, self.width)

    @property
    def packed_group(self) -> int | None:
        """The group size under which MLX's own kernels read this weight; None where they cannot (7 bits, ragged
        widths).
        """
        if self._format.bits == 7:
            return None
        if isinstance(self._format.group, int):
            return self._format.group
        return next((g for g in reversed(GROUPS) if self.width % g == 0), None)

    def packed_scales(self) -> tuple[mx.array, mx.array]:
        """Scales and biases float32 [out, in / packed_group] for ``mx.quantized_matmul`` and ``mx.dequantize``."""
        assert self.packed_group is not None
        shape = (self.rows, self.width // self.packed_group)
        scales, biases = (mx.broadcast_to(v, shape) for v in self.scales_and_biases())
        return scales, biases

    def centred_codes(self) -> mx.array:
        """Codes minus the zero code, float32 [out, in]: the integers that the matmul runs on."""
        one = mx.ones((1, 1))
        return dequantized(self[WEIGHT], one, -self._format.zero_code * one, self._format.bits, self.width)

    def unit_scales(self) -> tuple[mx.array, mx.array]:
        """The scales and biases float32 [out, in / packed_group] under which MLX's kernels read centred codes."""
        assert self.packed_group is not None
        ones = mx.ones((self.rows, self.width // self.packed_group))
        return ones, ones * -self._format.zero_code

    def share_integers(self, other: QuantizedLayer) -> None:
        """Take the arrays of another layer's integer weight in place of its own, which are equal."""
        for name in INTEGERS:
            if name in other:
                self[name] = other[name]

    def differences(self, module: nn.Module) -> str | None:
        """What a module of the class that it ``replaces`` has other than the one it was made of, in words; None for
        nothing.
        """
        if module.weight.shape != self._shape:
            return f"the model's has shape {module.weight.shape}"
        return "and just one of the two has a bias" if (BIAS in module) != (BIAS in self) else None
