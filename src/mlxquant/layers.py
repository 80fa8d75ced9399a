"""The layer that runs quantized.

``QuantizedLinear`` holds integer weights in MLX's packed layout and, optionally, a static activation table indexed by noise level.
W4A8, W8A8, W8A16, W4A16 are specifications of it, not classes. With a table it subtracts the shift, divides by the step, rounds and
clips to integer codes, multiplies integers, and rescales once; the shift's share is folded into the bias. The integer part runs in
float32, in chunks of the input short enough that every partial sum is an exact integer, so it equals int32 arithmetic bit for bit.
Group-wise scales cannot leave the sum: there the integer activations meet dequantized weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .activations import ActivationTable, Entry, TableReader
from .errors import AdapterError
from .formats import GROUPS, Grid, WeightFormat, pack, unpack
from .schedule import Clock

EXACT = 2**24  # integers up to this magnitude are exact in float32


class QuantizedLinear(nn.Module):
    """``y = x W^T + b`` with integer W.

    Parameters: ``weight`` uint32 [out, words], ``scales`` float16 [out or 1, groups], ``biases`` likewise on asymmetric grids,
    ``bias`` [out] optional, and, with a table, ``act_sigma``, ``act_step``, ``act_shift``, ``act_bits`` (see ActivationTable).
    ``act_divisor`` float32 [in], optional: the input's channels are divided by it first, and the integer weight stands for
    ``W diag(act_divisor)``, so the function is the same; the table then describes the divided input.
    """

    def __init__(self, codes: npt.NDArray[Any], grid: Grid, bias: mx.array | None = None, divisor: mx.array | None = None):
        """codes uint8 [out, in] on ``grid``; bias [out] is kept as it is. Raises AdapterError when a divisor [in] does not fit."""
        super().__init__()
        self._format, self._shape = grid.format, (int(codes.shape[0]), int(codes.shape[1]))
        self.weight = mx.array(pack(codes, grid.format.bits))
        rows = 1 if grid.format.group == "tensor" else codes.shape[0]
        self.scales = mx.array(grid.scales[:rows].astype(np.float16))
        if not grid.format.symmetric:
            self.biases = mx.array(grid.biases[:rows].astype(np.float16))
        if bias is not None:
            self.bias = bias
        if divisor is not None:
            if divisor.shape != (self._shape[1],):
                raise AdapterError(f"a divisor of shape {divisor.shape} does not fit an input of width {self._shape[1]}")
            self.act_divisor = divisor.astype(mx.float32)
        self._clock: Clock | None = None
        self._reader: TableReader | None = None
        self.freeze()

    @property
    def facts(self) -> dict[str, Any]:
        """The layer's structure as plain data: what ``blank`` needs to rebuild it."""
        table = None if self.table is None else list(self.table.shift.shape)
        parts = {"bias": "bias" in self, "divisor": "act_divisor" in self, "table": table}
        return {"format": self._format.to_dict(), "shape": list(self._shape), **parts}

    @classmethod
    def blank(cls, facts: Mapping[str, Any], clock: Clock) -> QuantizedLinear:
        """A layer of the structure that ``facts`` describes, to be filled with ``load_weights`` and ``refresh``."""
        format, (rows, width) = WeightFormat(**facts["format"]), facts["shape"]
        groups = width // format.columns(width)
        ones = np.ones((rows, groups), np.float32)
        bias, divisor = mx.zeros(rows) if facts["bias"] else None, mx.ones(width) if facts.get("divisor") else None
        layer = cls(np.zeros((rows, width), np.uint8), Grid(format, ones, ones), bias, divisor)
        if facts["table"] is not None:
            entries, shifts = facts["table"]
            sigma, eight = np.arange(entries, dtype=np.float32), np.full(entries, 8, np.uint8)
            layer.set_activations(ActivationTable(sigma, sigma + 1, np.zeros((entries, shifts), np.float32), eight), clock)
        return layer

    def with_codes(self, codes: npt.NDArray[Any]) -> QuantizedLinear:
        """The same layer with other codes uint8 [out, in]."""
        divisor = self.act_divisor if "act_divisor" in self else None
        other = QuantizedLinear(codes, self.grid(), self.bias if "bias" in self else None, divisor)
        if self.table is not None and self._clock is not None:
            other.set_activations(self.table, self._clock)
        return other

    @property
    def format(self) -> WeightFormat:
        return self._format

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self._shape

    @property
    def table(self) -> ActivationTable | None:
        return None if self._reader is None else self._reader.table

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight: codes, scales and biases."""
        return int(self.weight.nbytes + self.scales.nbytes + (self.biases.nbytes if "biases" in self else 0))

    def set_activations(self, table: ActivationTable, clock: Clock) -> None:
        """Quantize the input from now on, by ``table`` at the time that ``clock`` shows."""
        if table.shift.shape[1] not in (1, self._shape[1]):
            raise AdapterError(f"activation shift of width {table.shift.shape[1]} does not fit an input of width {self._shape[1]}")
        self._clock = clock
        self.act_sigma, self.act_step = mx.array(table.sigma, mx.float32), mx.array(table.step, mx.float32)
        self.act_shift, self.act_bits = mx.array(table.shift, mx.float32), mx.array(table.bits, mx.uint8)
        self.refresh()

    def drop_activations(self) -> None:
        """Run with unquantized inputs from now on."""
        self._clock = self._reader = None
        for name in ("act_sigma", "act_step", "act_shift", "act_bits"):
            self.pop(name, None)

    def refresh(self) -> None:
        """Read the table back from the parameters; call it after ``load_weights``."""
        if self._clock is not None:
            arrays = (np.array(self[k]) for k in ("act_sigma", "act_step", "act_shift", "act_bits"))
            self._reader = TableReader(ActivationTable(*arrays), self._clock)

    def codes(self) -> npt.NDArray[Any]:
        """The weight's codes, uint8 [out, in]."""
        return unpack(np.array(self.weight), self._format.bits, self._shape[1])

    def grid(self) -> Grid:
        rows, scales = self._shape[0], np.array(self.scales).astype(np.float32)
        biases = np.array(self.biases).astype(np.float32) if "biases" in self else -self._format.zero_code * scales
        return Grid(self._format, *(np.broadcast_to(v, (rows, v.shape[1])) for v in (scales, biases)))

    @property
    def packed_group(self) -> int | None:
        """The group size under which MLX's own kernels read this weight; None where they cannot (7 bits, ragged widths)."""
        if self._format.bits == 7:
            return None
        if isinstance(self._format.group, int):
            return self._format.group
        return next((g for g in reversed(GROUPS) if self._shape[1] % g == 0), None)

    def packed_scales(self) -> tuple[mx.array, mx.array]:
        """Scales and biases float16 [out, in / packed_group] for ``mx.quantized_matmul`` and ``mx.dequantize``."""
        assert self.packed_group is not None
        shape = (self._shape[0], self._shape[1] // self.packed_group)
        biases = self.biases if "biases" in self else self.scales * -self._format.zero_code
        return mx.broadcast_to(self.scales, shape), mx.broadcast_to(biases, shape)

    def centred_codes(self) -> mx.array:
        """Codes minus the zero code, float32 [out, in]: the integers that the matmul runs on."""
        zero, group = self._format.zero_code, self.packed_group
        if group is None:
            return mx.array(self.codes().astype(np.float32) - zero)
        ones = mx.ones((self._shape[0], self._shape[1] // group))
        return mx.dequantize(self.weight, ones, ones * -zero, group_size=group, bits=self._format.bits)

    def dequantized(self, centred: mx.array | None = None) -> mx.array:
        """The weight as float32 [out, in], times the divisor where there is one."""
        centred = self.centred_codes() if centred is None else centred
        shape = (self._shape[0], self.scales.shape[1], -1)
        weight = centred.reshape(shape) * self.scales[..., None].astype(mx.float32)
        if "biases" in self:
            weight = weight + self._offsets()[..., None]
        return weight.reshape(self._shape)

    def _offsets(self) -> mx.array:
        """What a centred code of zero stands for on an asymmetric grid, float32 [out or 1, groups]."""
        return self.biases.astype(mx.float32) + self._format.zero_code * self.scales.astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] to [..., out], in x's dtype."""
        if "act_divisor" in self:
            x = x / self.act_divisor.astype(x.dtype)
        if self._reader is None:
            return self._weight_only(x)
        entry = self._reader.read(x)
        if entry.all_float:
            return self._weight_only(x)
        y = self._integer(x, entry)
        return mx.where(entry.is_float, self._weight_only(x), y) if entry.any_float else y

    def _weight_only(self, x: mx.array) -> mx.array:
        if use_packed_kernels() and self.packed_group is not None:
            scales, biases = (v.astype(x.dtype) for v in self.packed_scales())
            y = mx.quantized_matmul(x, self.weight, scales, biases, group_size=self.packed_group, bits=self._format.bits)
        else:
            y = x @ self.dequantized().astype(x.dtype).T
        return y + self.bias.astype(x.dtype) if "bias" in self else y

    def _integer(self, x: mx.array, entry: Entry) -> mx.array:
        step, shift = entry.step, entry.shift
        q = mx.clip(mx.round((x.astype(mx.float32) - shift) / step), -entry.edge, entry.edge - 1)
        centred = self.centred_codes()
        weight = self.dequantized(centred)
        folded = shift @ _fold(weight, shift)
        if self.scales.shape[1] == 1:
            y = self._multiply_codes(q, centred, entry.limit) * (step * self.scales.astype(mx.float32)[:, 0])
            if "biases" in self:
                y = y + q.sum(-1, keepdims=True) * (step * self._offsets()[:, 0])
        else:
            y = (q @ weight.T) * step
        y = y + (folded + self.bias.astype(mx.float32) if "bias" in self else folded)
        return y.astype(x.dtype)

    def _multiply_codes(self, q: mx.array, centred: mx.array, limit: int) -> mx.array:
        """Integer product of activation codes [...,in] and weight codes, float32 [...,out]."""
        zero, group = self._format.zero_code, self.packed_group
        if use_packed_kernels() and group is not None and self._shape[1] * limit * zero <= EXACT:
            ones = mx.ones((self._shape[0], self._shape[1] // group))
            return mx.quantized_matmul(q, self.weight, ones, ones * -zero, group_size=group, bits=self._format.bits)
        return integer_matmul(q, centred, limit, zero)


def use_packed_kernels() -> bool:
    """Whether to multiply by packed weights directly. On the CPU backend dequantizing first is 30 to 40 times faster."""
    return bool(mx.default_device() != mx.cpu)


def find_quantized(module: nn.Module) -> dict[str, QuantizedLinear]:
    """Every quantized layer of a module, by path."""
    return {path: m for path, m in module.named_modules() if isinstance(m, QuantizedLinear)}


def _fold(weight: mx.array, shift: mx.array) -> mx.array:
    """What a shift [...,1] or [...,in] is multiplied with to give ``shift W^T``: row sums [1,out] or the transpose [in,out]."""
    return weight.sum(axis=1)[None] if shift.shape[-1] == 1 else weight.T


def integer_matmul(x: mx.array, weight: mx.array, x_limit: int, weight_limit: int) -> mx.array:
    """``x W^T`` of integer-valued float32 arrays with |x| <= x_limit and |W| <= weight_limit, equal to int32 arithmetic.

    x [..., in], weight [out, in]. The input is cut where a partial sum could pass 2^24; the parts are added as int32. Returns the
    float32 nearest to the exact sum.
    """
    width = weight.shape[1]
    chunk = max(1, EXACT // (x_limit * weight_limit))
    if width <= chunk:
        return x @ weight.T
    parts = [(x[..., i : i + chunk] @ weight[:, i : i + chunk].T).astype(mx.int32) for i in range(0, width, chunk)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.astype(mx.float32)
