"""The layer that runs quantized.

``QuantizedLinear`` holds integer weights in MLX's packed layout and, optionally, a static activation table indexed by
noise level. W4A8, W8A8, W8A16, W4A16 are specifications of it, not classes.

What happens to an input x, in this order: its channels are divided by ``act_divisor``, blocks of them are rotated, and
only then is it rounded and multiplied, for the table and the integer weight both describe the transformed input. The
low-rank branch reads that same input before it is rounded.

There are three ways to multiply, because none is both exact and always possible:

1. *Weights only* (``_weight_only``): the input is not quantized, here or at this noise level. One matmul, by MLX's
   packed kernels on Metal and by dequantized weights on the CPU.
2. *Integers* (``_integer``, one scale a row, uniform levels): subtract the shift, divide by the step, round, clip,
   multiply integers, rescale once; what the shift adds to every output is folded in afterwards. The integer part runs
   in float32, in chunks of the input short enough that every partial sum is an exact integer, so it equals int32
   arithmetic bit for bit, whatever the order of the sum.
3. *Simulated* (``_integer``, else): group-wise scales cannot leave the sum, and the levels of logarithmic entries are
   no multiples of a step. There the rounded input, back on its own scale, meets dequantized weights.

All three compute in float32, whatever the input's dtype, and only the output is rounded to that. MLX's packed kernels
would read scales and biases in the input's dtype, and bfloat16 has 8 digits for the 11 of a scale: that alone cost 2.7
% of an 8-bit layer's output on the CPU, 0.34 % in float16.

What is computed from the parameters once (the reader of the table, the sums of rows) is kept beside them, and MLX does
not tell a module when its parameters are loaded: whoever changes them calls ``refresh`` afterwards, or the layer goes
on with what it had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import AdapterError
from ..files import schema
from ..grids.integer_matmul import EXACT, integer_matmul, use_packed_kernels
from ..grids.packing import pack
from ..grids.reading import Entry, represented
from ..grids.tables import ActivationTable
from ..grids.time import Clock
from ..grids.weights import FORMAT, Grid, WeightFormat
from ..numerics.arrays import Array
from ..numerics.hadamard import block_size, rotated_blocks
from ..numerics.low_rank import LowRank
from .names import BIAS, DIVISOR, DOWN, LOG, SHIFT, TOKEN, UP, WEIGHT
from .own import Obstacle
from .packed import BRANCH_DTYPE, SCALE_DTYPE, QuantizedLayer, name_of, scale_dtype, stored_dtype
from .plain import obstacles
from .quantized_input import QuantizedInput
from .tree import parameters


class QuantizedLinear(QuantizedInput, QuantizedLayer):
    """``y = x W^T + b`` with integer W; its input may be quantized, too.

    Parameters beside those of every ``QuantizedLayer`` and ``QuantizedInput``: ``act_divisor`` float32 [in], optional:
    the input's channels are divided by it first. With a ``rotation`` above 1, blocks of so many channels are then
    rotated by a regular Hadamard matrix. The integer weight stands for ``W' = W diag(act_divisor) R``, so the function
    is the same, and the table describes the transformed input. With ``low_up`` [out,r] and ``low_down`` [r,in],
    the integer weight stands for ``W' - low_up low_down`` instead, and those two multiply the transformed input as it
    is, never quantized.

    Args:
        codes: Codes of the integer weight, uint8 [out, in].
        grid: The levels that the codes stand for.
        bias: What is added to each output [out], kept in its dtype; None for nothing.
        divisor: What the input's channels are divided by, float [in]; None for nothing.
        rotation: In blocks of how many channels the input is rotated, a power of 4 that divides ``in``; 1 for not.
        branch: What is added to the integer weight, never quantized; None for nothing.

    Raises:
        AdapterError: Where divisor, rotation or branch do not fit the codes.
    """

    replaces: ClassVar[type[nn.Module]] = nn.Linear
    STRUCTURE = schema.entries(
        {
            "format": FORMAT,
            "shape": schema.array_of(schema.whole(1), 2, 2),
            "bias": schema.flag,
            "table": schema.maybe(schema.array_of(schema.whole(1), 2, 2)),
        },
        {
            "bias_dtype": schema.maybe(schema.floating),
            "divisor": schema.flag,
            "rotation": schema.whole(1),
            "rank": schema.whole(),
            "log": schema.flag,
            "token": schema.flag,
            SCALE_DTYPE: schema.floating,
            BRANCH_DTYPE: schema.floating,
        },
    )

    def __init__(
        self,
        codes: Array,
        grid: Grid,
        bias: mx.array | None = None,
        divisor: mx.array | None = None,
        rotation: int = 1,
        branch: LowRank | None = None,
    ):
        if divisor is not None and divisor.shape != codes.shape[1:]:
            raise AdapterError(f"a divisor of shape {divisor.shape} does not fit an input of width {codes.shape[1]}")
        if branch is not None and (branch.up.shape[0], branch.down.shape[1]) != codes.shape:
            raise AdapterError(
                f"a branch of {branch.up.shape} and {branch.down.shape} does not fit a weight of shape {codes.shape}"
            )
        super().__init__()
        rank, dtype = 0 if branch is None else branch.rank, None if bias is None else bias.dtype
        factors = mx.float32 if branch is not None and branch.up.dtype == np.float32 else mx.float16
        self._lay_out(grid.format, codes.shape, dtype, divisor is not None, rotation, rank, stored_dtype(grid), factors)
        self._fill(
            codes,
            grid,
            **{
                BIAS: bias,
                DIVISOR: None if divisor is None else divisor.astype(mx.float32),
                UP: None if branch is None else mx.array(branch.up, factors),
                DOWN: None if branch is None else mx.array(branch.down, factors),
            },
        )

    def _lay_out(
        self,
        format: WeightFormat,
        shape: Sequence[int],
        bias: mx.Dtype | None,
        divisor: bool,
        rotation: int = 1,
        rank: int = 0,
        scales: mx.Dtype = mx.float16,
        factors: mx.Dtype = mx.float16,
    ) -> None:
        """Every parameter of a layer [out, in] of this structure in its shape and dtype, zero and not evaluated."""
        rows, width = shape
        if rotation != block_size(width, rotation):
            raise AdapterError(
                f"blocks of {rotation} cannot rotate an input of width {width}; expected a power of 4 that divides it"
            )
        self._rotation = rotation
        self._lay_out_weight(format, shape, bias, scales)
        if divisor:
            self[DIVISOR] = mx.zeros((width,), mx.float32)
        if rank:
            self[UP], self[DOWN] = mx.zeros((rows, rank), factors), mx.zeros((rank, width), factors)
        self._clock: Clock | None = None
        self.refresh()
        self.freeze()  # scales and tables are no business of an optimizer's

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "format": self._format.to_dict(),
            "shape": list(self._shape),
            "bias": BIAS in self,
            "bias_dtype": name_of(self[BIAS].dtype) if BIAS in self else None,
            "divisor": DIVISOR in self,
            "rotation": self._rotation,
            "rank": self.rank,
            "table": list(self[SHIFT].shape) if SHIFT in self else None,
            "log": LOG in self,
            "token": TOKEN in self,
            **self.scale_facts,
            **({BRANCH_DTYPE: "float32"} if self.rank and self[UP].dtype == mx.float32 else {}),
            **self._network_facts,
        }

    @classmethod
    def blank(cls, facts: Mapping[str, Any], clock: Clock | None) -> Self:
        layer = cls._bare()
        bias = getattr(mx, facts.get("bias_dtype", "float32")) if facts["bias"] else None
        format, divided = WeightFormat(**facts["format"]), bool(facts.get("divisor"))
        rotation, rank = facts.get("rotation", 1), facts.get("rank", 0)
        factors = getattr(mx, facts.get(BRANCH_DTYPE, "float16"))
        layer._lay_out(format, facts["shape"], bias, divided, rotation, rank, scale_dtype(facts), factors)
        if facts["table"] is not None:
            entries, shifts = facts["table"]
            layer._lay_out_input(clock, entries, shifts, bool(facts.get("log")), facts.get("network"))
        if facts.get("token"):
            layer[TOKEN] = mx.zeros((1,), mx.uint8)
        return layer

    def with_codes(self, codes: Array) -> QuantizedLinear:
        """The same layer with other codes; all else is shared.

        Args:
            codes: On the same grid, uint8 [out, in].
        """
        other = QuantizedLinear.blank(self.facts, self._clock)
        other.load_weights(list(parameters(self).items()))  # shared, but for the codes
        other[WEIGHT] = mx.array(pack(codes, self._format.bits))
        return other

    @property
    def rotation(self) -> int:
        """In blocks of how many channels the input is rotated; 1 where it is not."""
        return self._rotation

    @property
    def divisor(self) -> mx.array | None:
        """What the input's channels are divided by, float32 [in]."""
        return self.get(DIVISOR)

    @property
    def rank(self) -> int:
        """That of the branch; 0 where there is none."""
        return self[UP].shape[1] if UP in self else 0

    @property
    def branch(self) -> LowRank | None:
        return LowRank(np.array(self[UP]), np.array(self[DOWN])) if UP in self else None

    def set_activations(self, table: ActivationTable, clock: Clock) -> None:
        if table.shift.shape[1] not in (1, self.width):
            raise AdapterError(
                f"activation shift of width {table.shift.shape[1]} does not fit an input of width {self.width}"
            )
        super().set_activations(table, clock)

    def obstacles(self) -> list[Obstacle]:
        return obstacles(self.facts)

    def _extra_repr(self) -> str:
        return f"{self._shape}, {self._format}, bias={BIAS in self}"

    def refresh(self) -> None:
        super().refresh()
        self._sums: mx.array | None = None

    def _row_sums(self) -> mx.array:
        """The sum of each row of the weight, float32 [out]."""
        if self._sums is None:
            self._sums = self.dequantized().sum(axis=1)
            mx.eval(self._sums)  # now, so that it is not kept as a part of the caller's graph
        return self._sums

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] to [..., out], in x's dtype, rounded to it once."""
        seen = self.transformed(x)
        return self.add_branch(self._multiply_quantized(seen), seen).astype(x.dtype)

    def transformed(self, x: mx.array) -> mx.array:
        """An input as the weight reads it: divided, then rotated.

        Args:
            x: [..., in].

        Returns:
            [..., in], float32; as it is where there is neither.
        """
        if DIVISOR in self:
            x = x.astype(mx.float32) / self[DIVISOR]
        if self._rotation > 1:
            x = rotated_blocks(x.astype(mx.float32), self._rotation)
        return x

    def add_branch(self, y: mx.array, x: mx.array) -> mx.array:
        """An output and what the branch adds to it, summed in float32.

        Args:
            y: What the integers make of the input, [..., out].
            x: The input, ``transformed`` but not rounded, [..., in].

        Returns:
            [..., out], in y's dtype.
        """
        if UP not in self:
            return y
        up, down = self[UP].astype(mx.float32), self[DOWN].astype(mx.float32)
        return (y.astype(mx.float32) + (x.astype(mx.float32) @ down.T) @ up.T).astype(y.dtype)

    def _multiply_quantized(self, x: mx.array) -> mx.array:
        """The integer weight times a transformed input [..., in], with the bias: float32 [..., out]."""
        if (reader := self.reader) is None:
            return self._weight_only(x)
        entry = reader.read(x)
        if entry.all_float:
            return self._weight_only(x)
        y = self._integer(x, entry)  # both where the samples of a batch are at noise levels that differ in this
        return mx.where(entry.is_float, self._weight_only(x), y) if entry.any_float else y

    @property
    def _runs_packed(self) -> bool:
        return use_packed_kernels() and self.packed_group is not None

    def _weight_only(self, x: mx.array) -> mx.array:
        y = self._multiply(x)
        return y + self.bias.astype(mx.float32) if BIAS in self else y

    def _multiply(self, x: mx.array) -> mx.array:
        """``x W^T`` float32 [...,out]."""
        x = x.astype(mx.float32)
        if self._runs_packed:
            return self._multiply_packed(x, *self.packed_scales())
        return x @ self.dequantized().T

    def _integer(self, x: mx.array, entry: Entry) -> mx.array:
        if self.scales.shape[1] > 1 or entry.any_log:
            y = self._multiply(represented(x, entry))
        else:
            step, shift, centred = entry.step, entry.shift, self.centred_codes()
            q = mx.clip(mx.round((x.astype(mx.float32) - shift) / step), -entry.edge, entry.edge - 1)
            y = self._rescaled(self._multiply_codes(q, centred, entry.limit), q, step) + self._folded(shift, centred)
        return y + self.bias.astype(mx.float32) if BIAS in self else y

    def _folded(self, shift: mx.array, centred: mx.array) -> mx.array:
        """``shift W^T``, what a shift [...,1] or [...,in] adds to every output, float32 [...,out]."""
        if shift.shape[-1] == 1:
            return shift * self._row_sums()
        return self._rescaled(
            self._multiply_packed(shift, *self.unit_scales()) if self._runs_packed else shift @ centred.T, shift, 1
        )

    def _rescaled(self, product: mx.array, x: mx.array, step: mx.array | int) -> mx.array:
        """``step x W^T`` float32 [...,out] from ``product = x C^T``, C the centred codes of a weight with one scale a
        row.
        """
        scales, biases = (v[:, 0] for v in self.scales_and_biases())
        y = product * (step * scales)
        if not self._format.symmetric:
            y = y + x.sum(-1, keepdims=True) * (step * (biases + self._format.zero_code * scales))
        return y

    def _multiply_codes(self, q: mx.array, centred: mx.array, limit: int) -> mx.array:
        """``q C^T`` float32 [...,out], exact for integers q [...,in] with |q| <= limit; C are the centred codes."""
        if self._runs_packed and self.width * limit * (self._format.levels - 1) <= EXACT:
            return self._multiply_packed(q, *self.unit_scales())  # sums products of codes as they are stored, from 0 on
        return integer_matmul(q, centred, limit, self._format.zero_code)

    def _multiply_packed(self, x: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        """An input times the packed weight on these scales and biases, float32, by MLX's kernels."""
        return mx.quantized_matmul(x, self.weight, scales, biases, group_size=self.packed_group, bits=self._format.bits)


def find_quantized(module: nn.Module) -> dict[str, QuantizedLinear]:
    """Every quantized linear layer of a module, embeddings among them, by path."""
    return {path: m for path, m in module.named_modules() if isinstance(m, QuantizedLinear)}
