"""Layers that multiply: an input, perhaps quantized, times a weight in integer codes.

A Linear, a convolution, a switch layer differ in what of their input meets which row of the weight. Each says that in
three words, and everything else is here: ``unrolled`` gives the rows that an input becomes (the patches of a
convolution), ``meet`` multiplies them by a weight [rows, in], and ``by_output`` brings a number for each row of the
weight to where the outputs are.

What happens to an input x, in this order: its channels are divided, blocks of them are rotated (a Linear's alone), and
only then is it rounded and multiplied, for the table and the integer weight both describe the transformed input. The
low-rank branch reads that same input before it is rounded.

There are three ways to multiply, because none is both exact and always possible:

1. *Weights only* (``_weight_only``): the input is not quantized, here or at this noise level. One product, by MLX's
   packed kernels on Metal and by dequantized weights on the CPU.
2. *Integers* (``_integer``, one scale a row, uniform levels, one step a sample): subtract the shift, divide by the
   step, round, clip, multiply integers, rescale once; what the shift adds to every output is folded in afterwards, and
   nothing where a convolution is padded. The integer part runs in float32, in chunks of the input short enough that
   every partial sum is an exact integer, so it equals int32 arithmetic bit for bit, whatever the order of the sum.
3. *Simulated* (``_integer``, else): group-wise scales cannot leave the sum, the levels of logarithmic entries are no
   multiples of a step, and where a convolution's input has a scale a token, one sum has several. There the rounded
   input, back on its own scale, meets dequantized weights.

All three compute in float32, whatever the input's dtype, and only the output is rounded to that. MLX's packed kernels
would read scales and biases in the input's dtype, and bfloat16 has 8 digits for the 11 of a scale: that alone cost 2.7
% of an 8-bit layer's output on the CPU, 0.34 % in float16.

What is computed from the parameters once (the reader of the table, the sums of rows) is kept beside them, and MLX does
not tell a module when its parameters are loaded: whoever changes them calls ``refresh`` afterwards, or the layer goes
on with what it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import mlx.core as mx
import numpy as np

from ..errors import AdapterError
from ..files import schema
from ..grids.integer_matmul import EXACT, integer_matmul, use_packed_kernels
from ..grids.packing import pack
from ..grids.reading import Entry, TokenReader, represented
from ..grids.tables import ActivationTable
from ..grids.time import Clock
from ..grids.weights import WeightFormat
from ..numerics.arrays import Array
from ..numerics.low_rank import LowRank
from .names import BIAS, DOWN, LOG, SHIFT, TOKEN, UP, WEIGHT
from .own import Obstacle
from .packed import BRANCH_DTYPE, SCALE_DTYPE, QuantizedLayer
from .plain import obstacles
from .quantized_input import QuantizedInput
from .tree import parameters

PRODUCT = {  # in facts, where there is any of it
    SCALE_DTYPE: schema.floating,
    BRANCH_DTYPE: schema.floating,
    "bias_dtype": schema.floating,
    "table": schema.array_of(schema.whole(1), 2, 2),
    "rank": schema.whole(),
    "log": schema.flag,
    "token": schema.flag,
}


def branch_weight(branch: LowRank, parts: int) -> Array:
    """What the factors of so many parts, one below the other, stand for: float32 [rows, in]."""
    factors = zip(np.split(branch.up, parts), np.split(branch.down, parts), strict=True)
    return np.concatenate([LowRank(up, down).weight for up, down in factors])


class QuantizedProduct(QuantizedInput, QuantizedLayer):
    """An integer weight that multiplies an input, which may be quantized, too.

    With ``low_up`` [rows, r] and ``low_down`` [parts * r, in] the integer weight stands for what those leave, which
    multiply the input as it is, never quantized.
    """

    mixes_tokens: ClassVar[bool] = False  # whether one output is a sum over several tokens

    @staticmethod
    def arguments(*where: Any, **named: Any) -> tuple[Any, ...]:
        """What ``product`` and the others need of a call, beside the input."""
        return ()

    def unrolled(self, x: mx.array) -> mx.array:
        """The rows [..., in] that an input becomes; those of the parts along the axis before the last."""
        return x

    def meet(self, rows: mx.array, weight: mx.array, *where: Any) -> mx.array:
        """Unrolled rows times a weight [parts * n, in]: [..., parts * n], or [..., n] where a row meets one part."""
        raise NotImplementedError

    def product(self, x: mx.array, weight: mx.array, *where: Any) -> mx.array:
        """What a layer with this weight float32 [rows, in] makes of a float32 input, without a bias."""
        return self.meet(self.unrolled(x), weight, *where)

    def by_output(self, values: mx.array, *where: Any) -> mx.array:
        """Numbers of the weight's rows [rows] where outputs are that these rows make."""
        return values

    def sums(self, rows: mx.array) -> mx.array:
        """The sum of each unrolled row, where its outputs are."""
        return rows.sum(-1, keepdims=True)

    def raised(self, h: mx.array, up: mx.array, *where: Any) -> mx.array:
        """What a branch's ``up`` [rows, r] makes of what its ``down`` has made of the input."""
        return self.meet(h, up, *where)

    def ones(self, x: mx.array, *where: Any) -> mx.array:
        """What the weight makes of an input of ones of x's shape, which broadcasts against the output."""
        return self.by_output(self._row_sums(), *where)

    def _lay_out_branch(self, rank: int, factors: mx.Dtype) -> None:
        if rank:
            self[UP] = mx.zeros((self.rows, rank), factors)
            self[DOWN] = mx.zeros((self.parts * rank, self.width), factors)

    @staticmethod
    def _branch_dtype(branch: LowRank | None) -> mx.Dtype:
        return mx.float32 if branch is not None and branch.up.dtype == np.float32 else mx.float16

    @staticmethod
    def _factors(branch: LowRank | None) -> dict[str, mx.array | None]:
        """The parameters of a branch, in its own precision."""
        if branch is None:
            return {UP: None, DOWN: None}
        dtype = QuantizedProduct._branch_dtype(branch)
        return {UP: mx.array(branch.up, dtype), DOWN: mx.array(branch.down, dtype)}

    def _check_branch(self, branch: LowRank | None) -> None:
        """Raise AdapterError on factors that do not fit the weight."""
        if branch is not None and (branch.up.shape, branch.down.shape) != (
            (self.rows, branch.rank),
            (self.parts * branch.rank, self.width),
        ):
            raise AdapterError(
                f"a branch of {branch.up.shape} and {branch.down.shape} does not fit a weight of shape"
                f" {(self.rows, self.width)} in {self.parts} parts"
            )

    @property
    def product_facts(self) -> dict[str, Any]:
        """Of ``facts``, what is about the input and the branch, as far as there is any."""
        found = {
            "rank": self.rank,
            "table": list(self[SHIFT].shape) if SHIFT in self else None,
            "log": LOG in self,
            "token": TOKEN in self,
            BRANCH_DTYPE: "float32" if self.rank and self[UP].dtype == mx.float32 else None,
        }
        return {name: value for name, value in found.items() if value} | self._network_facts

    def _lay_out_product(self, facts: Any, clock: Clock | None) -> None:
        """What ``product_facts`` tell of, zero and not evaluated."""
        self._clock: Clock | None = None
        self._lay_out_branch(facts.get("rank", 0), getattr(mx, facts.get(BRANCH_DTYPE, "float16")))
        if facts.get("table") is not None:
            entries, shifts = facts["table"]
            self._lay_out_input(clock, entries, shifts, bool(facts.get("log")), facts.get("network"))
        if facts.get("token"):
            self[TOKEN] = mx.zeros((1,), mx.uint8)
        self.refresh()
        self.freeze()  # scales and tables are no business of an optimizer's

    def with_codes(self, codes: Array) -> Self:
        """The same layer with other codes; all else is shared.

        Args:
            codes: On the same grid, uint8 [rows, in].
        """
        return self.with_numbers({WEIGHT: mx.array(pack(codes, self._format.bits))})

    def with_numbers(self, numbers: Mapping[str, mx.array], format: WeightFormat | None = None) -> Self:
        """The same layer with other values of some parameters, by name; all else is shared.

        Args:
            numbers: In the shapes that they have in a layer of the format.
            format: Of the weight, with as many bits; None for its own.
        """
        facts = self.facts if format is None else {**self.facts, "format": format.to_dict()}
        other = type(self).blank(facts, self._clock)
        other.load_weights(list({**parameters(self), **numbers}.items()))
        other.refresh()
        return other

    @property
    def rank(self) -> int:
        """That of the branch; 0 where there is none."""
        return self[UP].shape[1] if UP in self else 0

    @property
    def branch(self) -> LowRank | None:
        return LowRank(np.array(self[UP]), np.array(self[DOWN])) if UP in self else None

    def effective(self) -> Array:
        """What the integer weight and the branch stand for together, float32 [rows, in]."""
        weight = self.grid().dequantize(self.codes())
        if (branch := self.branch) is None:
            return weight
        return weight + branch_weight(branch, self.parts)

    def set_activations(self, table: ActivationTable, clock: Clock) -> None:
        if table.shift.shape[1] != 1:
            raise AdapterError(
                f"a {type(self).__name__} has one shift for all channels, found a table with shifts of width"
                f" {table.shift.shape[1]}"
            )
        super().set_activations(table, clock)

    def obstacles(self) -> list[Obstacle]:
        return obstacles(self.facts)

    def refresh(self) -> None:
        super().refresh()
        self._sums: mx.array | None = None

    def _row_sums(self) -> mx.array:
        """The sum of each row of the weight, float32 [rows]."""
        if self._sums is None:
            self._sums = self.matrix().sum(axis=1)
            mx.eval(self._sums)  # now, so that it is not kept as a part of the caller's graph
        return self._sums

    def multiplied(self, x: mx.array, *where: Any) -> mx.array:
        """What the layer makes of an input, in its dtype, rounded to it once."""
        seen = self.transformed(x)
        return self.add_branch(self._multiply_quantized(seen, *where), seen, *where).astype(x.dtype)

    def transformed(self, x: mx.array) -> mx.array:
        """An input as the weight reads it: as it is, where nothing is done to it first."""
        return x

    def add_branch(self, y: mx.array, x: mx.array, *where: Any) -> mx.array:
        """An output and what the branch adds to it, summed in float32.

        Args:
            y: What the integers make of the input, [..., out].
            x: The input, ``transformed`` but not rounded, [..., in].
            where: What else the layer is called with.

        Returns:
            [..., out], in y's dtype.
        """
        if UP not in self:
            return y
        up, down = self[UP].astype(mx.float32), self[DOWN].astype(mx.float32)
        added = self.raised(self.product(x.astype(mx.float32), down, *where), up, *where)
        return (y.astype(mx.float32) + added).astype(y.dtype)

    def with_bias(self, y: mx.array, *where: Any) -> mx.array:
        """A float32 output and the bias."""
        return y + self.by_output(self.bias.astype(mx.float32).reshape(-1), *where) if BIAS in self else y

    def _multiply_quantized(self, x: mx.array, *where: Any) -> mx.array:
        """The integer weight times a transformed input [..., in], with the bias: float32 [..., out]."""
        if (reader := self.reader) is None:
            return self._weight_only(x, *where)
        entry = reader.read(x)
        if entry.all_float:
            return self._weight_only(x, *where)
        y = self._integer(x, entry, *where)  # both where the samples of a batch are at levels that differ in this
        return mx.where(entry.is_float, self._weight_only(x, *where), y) if entry.any_float else y

    @property
    def _runs_packed(self) -> bool:
        return use_packed_kernels() and self.packed_group is not None

    def _weight_only(self, x: mx.array, *where: Any) -> mx.array:
        return self.with_bias(self._multiply(x, *where), *where)

    def _multiply(self, x: mx.array, *where: Any) -> mx.array:
        """``x W^T`` float32 [...,out]."""
        x = x.astype(mx.float32)
        if self._runs_packed:
            return self._multiply_packed(x, *self.packed_scales(), *where)
        return self.product(x, self.matrix(), *where)

    def _integer(self, x: mx.array, entry: Entry, *where: Any) -> mx.array:
        several = self.mixes_tokens and isinstance(self.reader, TokenReader)
        if self.scales.shape[1] > 1 or entry.any_log or several:
            y = self._multiply(represented(x, entry), *where)
        else:
            step, shift, centred = entry.step, entry.shift, self.centred_codes()
            q = mx.clip(mx.round((x.astype(mx.float32) - shift) / step), -entry.edge, entry.edge - 1)
            rows = self.unrolled(q)
            y = self._rescaled(self._multiply_codes(rows, centred, entry.limit, *where), rows, step, *where)
            y = y + self._folded(x, shift, centred, *where)
        return self.with_bias(y, *where)

    def _folded(self, x: mx.array, shift: mx.array, centred: mx.array, *where: Any) -> mx.array:
        """``shift W^T``, what a shift [...,1] or [...,in] of an input x adds to every output, float32 [...,out]."""
        return shift * self.ones(x, *where)

    def _rescaled(self, product: mx.array, rows: mx.array, step: mx.array | int, *where: Any) -> mx.array:
        """``step x W^T`` float32 [...,out] from ``product = x C^T``, C the centred codes of a weight with one scale a
        row.
        """
        scales, biases = (mx.broadcast_to(v[:, 0], (self.rows,)) for v in self.scales_and_biases())
        y = product * (step * self.by_output(scales, *where))
        if not self._format.symmetric:
            moved = self.by_output(biases + self._format.zero_code * scales, *where)
            y = y + self.sums(rows) * (step * moved)
        return y

    def _multiply_codes(self, rows: mx.array, centred: mx.array, limit: int, *where: Any) -> mx.array:
        """``q C^T`` float32 [...,out], exact for unrolled integers q [...,in] with |q| <= limit; C are the centred
        codes.
        """
        if self._runs_packed and self.width * limit * (self._format.levels - 1) <= EXACT:
            return self._multiply_packed(rows, *self.unit_scales(), *where)  # of codes as they are stored, from 0 on
        return integer_matmul(
            rows, centred, limit, self._format.zero_code, lambda some, weight: self.meet(some, weight, *where)
        )

    def _multiply_packed(self, x: mx.array, scales: mx.array, biases: mx.array, *where: Any) -> mx.array:
        """An input times the packed weight on these scales and biases, float32, by MLX's kernels."""
        raise NotImplementedError
