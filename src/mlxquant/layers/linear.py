"""The layer that runs quantized.

``QuantizedLinear`` holds integer weights in MLX's packed layout and, optionally, a static activation table indexed by
noise level. W4A8, W8A8, W8A16, W4A16 are specifications of it, not classes. With a table it subtracts the shift,
divides by the step, rounds and clips to integer codes, multiplies integers, and rescales once; the shift's share is
folded into the bias. The integer part runs in float32, in chunks of the input short enough that every partial sum is an
exact integer, so it equals int32 arithmetic bit for bit. Group-wise scales cannot leave the sum, and the levels of
logarithmic entries are no multiples of a step: there the rounded input, back on its own scale, meets dequantized
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..errors import AdapterError
from ..grids.integer_matmul import EXACT, integer_matmul, use_packed_kernels
from ..grids.packing import affine, dequantized, pack, unpack
from ..grids.reading import Entry, TableReader, TokenReader, represented
from ..grids.tables import TABLE, ActivationTable
from ..grids.time import Clock
from ..grids.weights import GROUPS, Grid, WeightFormat
from ..numerics.hadamard import block_size, rotated_blocks
from ..numerics.low_rank import LowRank
from .tree import parameters


class QuantizedLinear(nn.Module):
    """``y = x W^T + b`` with integer W.

    Parameters: ``weight`` uint32 [out, words], ``scales`` float16 [out or 1, groups], ``biases`` likewise on asymmetric
    grids, ``bias`` [out] optional, and, with a table, ``act_sigma``, ``act_step``, ``act_shift``, ``act_bits`` and,
    where an entry is logarithmic, ``act_log`` (see ActivationTable); or ``act_token`` uint8 [1], with how many bits
    each token is quantized by itself. ``act_divisor`` float32 [in], optional: the input's channels are divided by it
    first. With a ``rotation`` above 1, blocks of so many channels are then rotated by a regular Hadamard matrix. The
    integer weight stands for ``W' = W diag(act_divisor) R``, so the function is the same, and the table describes the
    transformed input. With ``low_up`` [out,r] and ``low_down`` [r,in] float16, the integer weight stands for ``W' -
    low_up low_down`` instead, and those two multiply the transformed input as it is, never quantized.
    """

    def __init__(
        self,
        codes: npt.NDArray[Any],
        grid: Grid,
        bias: mx.array | None = None,
        divisor: mx.array | None = None,
        rotation: int = 1,
        branch: LowRank | None = None,
    ):
        """codes uint8 [out, in] on ``grid``; bias [out] is kept as it is. Raises AdapterError when one of the others
        does not fit.
        """
        if divisor is not None and divisor.shape != codes.shape[1:]:
            raise AdapterError(f"a divisor of shape {divisor.shape} does not fit an input of width {codes.shape[1]}")
        if branch is not None and (branch.up.shape[0], branch.down.shape[1]) != codes.shape:
            raise AdapterError(
                f"a branch of {branch.up.shape} and {branch.down.shape} does not fit a weight of shape {codes.shape}"
            )
        rank = 0 if branch is None else branch.rank
        self._lay_out(
            grid.format, codes.shape, None if bias is None else bias.dtype, divisor is not None, rotation, rank
        )
        rows = self.scales.shape[0]
        values = {
            "weight": mx.array(pack(codes, grid.format.bits)),
            "scales": mx.array(grid.scales[:rows].astype(np.float16)),
            "biases": None if grid.format.symmetric else mx.array(grid.biases[:rows].astype(np.float16)),
            "bias": bias,
            "act_divisor": None if divisor is None else divisor.astype(mx.float32),
            "low_up": None if branch is None else mx.array(branch.up, mx.float16),
            "low_down": None if branch is None else mx.array(branch.down, mx.float16),
        }
        self.load_weights([(name, value) for name, value in values.items() if value is not None])

    def _lay_out(
        self,
        format: WeightFormat,
        shape: Sequence[int],
        bias: mx.Dtype | None,
        divisor: bool,
        rotation: int = 1,
        rank: int = 0,
    ) -> None:
        """Start over as a layer of this structure: every parameter in its shape and dtype, zero and not evaluated."""
        super().__init__()
        rows, width = shape
        if rotation != block_size(width, rotation):
            raise AdapterError(
                f"blocks of {rotation} cannot rotate an input of width {width}; expected a power of 4 that divides it"
            )
        self._format, self._shape, self._rotation = format, (rows, width), rotation
        groups = (1 if format.group == "tensor" else rows, width // format.columns(width))
        self.weight = mx.zeros((rows, pack(np.zeros((1, width), np.uint8), format.bits).shape[1]), mx.uint32)
        self.scales = mx.zeros(groups, mx.float16)
        if not format.symmetric:
            self.biases = mx.zeros(groups, mx.float16)
        if bias is not None:
            self.bias = mx.zeros((rows,), bias)
        if divisor:
            self.act_divisor = mx.zeros((width,), mx.float32)
        if rank:
            self.low_up, self.low_down = mx.zeros((rows, rank), mx.float16), mx.zeros((rank, width), mx.float16)
        self._clock: Clock | None = None
        self.refresh()
        self.freeze()

    @property
    def facts(self) -> dict[str, Any]:
        """The layer's structure as plain data: what ``blank`` needs to rebuild it."""
        return {
            "format": self._format.to_dict(),
            "shape": list(self._shape),
            "bias": "bias" in self,
            "bias_dtype": str(self.bias.dtype).removeprefix("mlx.core.") if "bias" in self else None,
            "divisor": "act_divisor" in self,
            "rotation": self._rotation,
            "rank": self.low_up.shape[1] if "low_up" in self else 0,
            "table": list(self.act_shift.shape) if "act_shift" in self else None,
            "log": "act_log" in self,
            "token": "act_token" in self,
        }

    @classmethod
    def blank(cls, facts: Mapping[str, Any], clock: Clock | None) -> QuantizedLinear:
        """A layer of the structure that ``facts`` describes, to be filled with ``load_weights`` and ``refresh``.

        Its parameters are not evaluated, so a blank takes neither time nor memory.
        """
        layer = cls.__new__(cls)
        bias = getattr(mx, facts.get("bias_dtype", "float32")) if facts["bias"] else None
        rotation, rank = facts.get("rotation", 1), facts.get("rank", 0)
        layer._lay_out(
            WeightFormat(**facts["format"]), facts["shape"], bias, bool(facts.get("divisor")), rotation, rank
        )
        if facts["table"] is not None:
            entries, shifts = facts["table"]
            layer._clock = clock
            for name, dtype in TABLE.items():
                if name != "act_log" or facts.get("log"):
                    layer[name] = mx.zeros((entries, shifts) if name == "act_shift" else (entries,), dtype)
        if facts.get("token"):
            layer.act_token = mx.zeros((1,), mx.uint8)
        return layer

    def with_codes(self, codes: npt.NDArray[Any]) -> QuantizedLinear:
        """The same layer with other codes uint8 [out, in]."""
        other = QuantizedLinear.blank(self.facts, self._clock)
        other.load_weights(list(parameters(self).items()))
        other.weight = mx.array(pack(codes, self._format.bits))
        return other

    @property
    def format(self) -> WeightFormat:
        return self._format

    @property
    def shape(self) -> tuple[int, int]:  # (out, in)
        return self._shape

    @property
    def table(self) -> ActivationTable | None:
        reader = self.reader
        return reader.table if isinstance(reader, TableReader) else None

    @property
    def input_bits(self) -> float:
        """With how many bits the input is quantized, averaged over noise levels; 16 where it is not."""
        return 16.0 if self.reader is None else self.reader.mean_bits

    @property
    def rotation(self) -> int:
        """In blocks of how many channels the input is rotated; 1 where it is not."""
        return self._rotation

    @property
    def branch(self) -> LowRank | None:
        return LowRank(np.array(self.low_up), np.array(self.low_down)) if "low_up" in self else None

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored in place of the weight: codes, scales and biases, the input's divisor, the branch."""
        return sum(
            self[name].nbytes
            for name in ("weight", "scales", "biases", "act_divisor", "low_up", "low_down")
            if name in self
        )

    def set_activations(self, table: ActivationTable, clock: Clock) -> None:
        """Quantize the input from now on, by ``table`` at the time that ``clock`` shows."""
        if table.shift.shape[1] not in (1, self._shape[1]):
            raise AdapterError(
                f"activation shift of width {table.shift.shape[1]} does not fit an input of width {self._shape[1]}"
            )
        self.drop_activations()
        self._clock = clock
        for (name, dtype), values in zip(
            TABLE.items(), (table.sigma, table.step, table.shift, table.bits, table.log), strict=True
        ):
            if name != "act_log" or table.log.any():
                self[name] = mx.array(values, dtype)
        self.refresh()

    def quantize_tokens(self, bits: int) -> None:
        """Quantize the input from now on, each token [...,in] on its own scale."""
        self.drop_activations()
        self.act_token = mx.array([bits], mx.uint8)
        self.refresh()

    def drop_activations(self) -> None:
        """Run with unquantized inputs from now on."""
        self._clock = None
        for name in (*TABLE, "act_token"):
            self.pop(name, None)
        self.refresh()

    def _extra_repr(self) -> str:
        return f"{self._shape}, {self._format}, bias={'bias' in self}"

    def refresh(self) -> None:
        """Forget what was computed from the parameters, to compute it again when it is needed; call it after
        ``load_weights``.
        """
        self._reader: TableReader | TokenReader | None = None
        self._sums: mx.array | None = None

    @property
    def reader(self) -> TableReader | TokenReader | None:
        """What says how an input is quantized, if it is."""
        if self._reader is None and self._clock is not None:
            self._reader = TableReader(
                ActivationTable(*(np.array(self[name]) for name in TABLE if name in self)), self._clock
            )
        if self._reader is None and "act_token" in self:
            self._reader = TokenReader(int(np.array(self.act_token)[0]))
        return self._reader

    def _row_sums(self) -> mx.array:
        """The sum of each row of the weight, float32 [out]."""
        if self._sums is None:
            self._sums = self.dequantized().sum(axis=1)
            mx.eval(self._sums)  # now, so that it is not kept as a part of the caller's graph
        return self._sums

    def codes(self) -> npt.NDArray[Any]:
        """The weight's codes, uint8 [out, in]."""
        return unpack(np.array(self.weight), self._format.bits, self._shape[1])

    def grid(self) -> Grid:
        rows, scales = self._shape[0], np.array(self.scales).astype(np.float32)
        biases = np.array(self.biases).astype(np.float32) if "biases" in self else -self._format.zero_code * scales
        return Grid(self._format, *(np.broadcast_to(v, (rows, v.shape[1])) for v in (scales, biases)))

    @property
    def packed_group(self) -> int | None:
        """The group size under which MLX's own kernels read this weight; None where they cannot (7 bits, ragged
        widths).
        """
        if self._format.bits == 7:
            return None
        if isinstance(self._format.group, int):
            return self._format.group
        return next((g for g in reversed(GROUPS) if self._shape[1] % g == 0), None)

    def packed_scales(self, dtype: mx.Dtype = mx.float16) -> tuple[mx.array, mx.array]:
        """Scales and biases [out, in / packed_group] for ``mx.quantized_matmul`` and ``mx.dequantize``."""
        assert self.packed_group is not None
        shape = (self._shape[0], self._shape[1] // self.packed_group)
        scales, biases = (mx.broadcast_to(v.astype(dtype), shape) for v in self._affine())
        return scales, biases

    def _affine(self) -> tuple[mx.array, mx.array]:
        """What a code is multiplied by and what is added, float32 [out or 1, groups]."""
        return affine(self, self._format)

    def centred_codes(self) -> mx.array:
        """Codes minus the zero code, float32 [out, in]: the integers that the matmul runs on."""
        one = mx.ones((1, 1))
        return dequantized(self.weight, one, -self._format.zero_code * one, self._format.bits, self._shape[1])

    def _unit_scales(self) -> tuple[mx.array, mx.array]:
        """The scales and biases float32 [out, in / packed_group] under which MLX's kernels read centred codes."""
        assert self.packed_group is not None
        ones = mx.ones((self._shape[0], self._shape[1] // self.packed_group))
        return ones, ones * -self._format.zero_code

    def dequantized(self) -> mx.array:
        """The integer weight as float32 [out, in]: what a transformed input is multiplied by, without the branch."""
        return dequantized(self.weight, *self._affine(), self._format.bits, self._shape[1])

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] to [..., out], in x's dtype."""
        x = self.transformed(x)
        return self.add_branch(self._multiply_quantized(x), x)

    def transformed(self, x: mx.array) -> mx.array:
        """x [..., in] as the weight reads it, divided and rotated, in x's dtype."""
        if "act_divisor" in self:
            x = x / self.act_divisor.astype(x.dtype)
        if self._rotation > 1:
            x = rotated_blocks(x.astype(mx.float32), self._rotation).astype(x.dtype)
        return x

    def add_branch(self, y: mx.array, x: mx.array) -> mx.array:
        """y [..., out], in its dtype, and what the branch makes of a transformed input x [..., in], in float32."""
        if "low_up" not in self:
            return y
        up, down = self.low_up.astype(mx.float32), self.low_down.astype(mx.float32)
        return (y.astype(mx.float32) + (x.astype(mx.float32) @ down.T) @ up.T).astype(y.dtype)

    def _multiply_quantized(self, x: mx.array) -> mx.array:
        """The integer weight times a transformed input [..., in], with the bias: [..., out], in x's dtype."""
        if (reader := self.reader) is None:
            return self._weight_only(x)
        entry = reader.read(x)
        if entry.all_float:
            return self._weight_only(x)
        y = self._integer(x, entry)
        return mx.where(entry.is_float, self._weight_only(x), y) if entry.any_float else y

    @property
    def _runs_packed(self) -> bool:
        return use_packed_kernels() and self.packed_group is not None

    def _weight_only(self, x: mx.array) -> mx.array:
        y = self._multiply(x)
        return y + self.bias.astype(x.dtype) if "bias" in self else y

    def _multiply(self, x: mx.array) -> mx.array:
        """``x W^T`` in x's dtype; on the CPU by way of float32, the only dtype whose matmul is fast there."""
        if self._runs_packed:
            scales, biases = self.packed_scales(x.dtype)
            return mx.quantized_matmul(
                x, self.weight, scales, biases, group_size=self.packed_group, bits=self._format.bits
            )
        return (x.astype(mx.float32) @ self.dequantized().T).astype(x.dtype)

    def _integer(self, x: mx.array, entry: Entry) -> mx.array:
        if self.scales.shape[1] > 1 or entry.any_log:
            y = self._multiply(represented(x, entry))
        else:
            step, shift, centred = entry.step, entry.shift, self.centred_codes()
            q = mx.clip(mx.round((x.astype(mx.float32) - shift) / step), -entry.edge, entry.edge - 1)
            y = self._rescaled(self._multiply_codes(q, centred, entry.limit), q, step) + self._folded(shift, centred)
        y = y + self.bias.astype(mx.float32) if "bias" in self else y
        return y.astype(x.dtype)

    def _folded(self, shift: mx.array, centred: mx.array) -> mx.array:
        """``shift W^T``, what a shift [...,1] or [...,in] adds to every output, float32 [...,out]."""
        if shift.shape[-1] == 1:
            return shift * self._row_sums()
        return self._rescaled(self._multiply_packed(shift) if self._runs_packed else shift @ centred.T, shift, 1)

    def _rescaled(self, product: mx.array, x: mx.array, step: mx.array | int) -> mx.array:
        """``step x W^T`` float32 [...,out] from ``product = x C^T``, C the centred codes of a weight with one scale a
        row.
        """
        scales, biases = (v[:, 0] for v in self._affine())
        y = product * (step * scales)
        if "biases" in self:
            y = y + x.sum(-1, keepdims=True) * (step * (biases + self._format.zero_code * scales))
        return y

    def _multiply_codes(self, q: mx.array, centred: mx.array, limit: int) -> mx.array:
        """``q C^T`` float32 [...,out], exact for integers q [...,in] with |q| <= limit; C are the centred codes."""
        zero = self._format.zero_code
        if self._runs_packed and self._shape[1] * limit * zero <= EXACT:
            return self._multiply_packed(q)
        return integer_matmul(q, centred, limit, zero)

    def _multiply_packed(self, x: mx.array) -> mx.array:
        """``x C^T`` by MLX's packed kernels."""
        return mx.quantized_matmul(
            x, self.weight, *self._unit_scales(), group_size=self.packed_group, bits=self._format.bits
        )


def find_quantized(module: nn.Module) -> dict[str, QuantizedLinear]:
    """Every quantized layer of a module, by path."""
    return {path: m for path, m in module.named_modules() if isinstance(m, QuantizedLinear)}
