"""The layer that runs quantized.

``QuantizedLinear`` holds integer weights in MLX's packed layout and, optionally, a static activation table indexed by
noise level. W4A8, W8A8, W8A16, W4A16 are specifications of it, not classes. How it multiplies is told in ``product``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import AdapterError
from ..files import schema
from ..grids.tables import ActivationTable
from ..grids.time import Clock
from ..grids.weights import FORMAT, Grid, WeightFormat
from ..numerics.arrays import Array
from ..numerics.hadamard import block_size, rotated_blocks
from ..numerics.layer_inputs import LayerInputs
from ..numerics.low_rank import LowRank
from .names import BIAS, DIVISOR, LOG, SHIFT, TOKEN, UP
from .packed import BRANCH_DTYPE, SCALE_DTYPE, name_of, scale_dtype, stored_dtype
from .product import QuantizedProduct
from .quantized_input import QuantizedInput


class QuantizedLinear(QuantizedProduct):
    """``y = x W^T + b`` with integer W; its input may be quantized, too.

    Parameters beside those of every ``QuantizedProduct``: ``act_divisor`` float32 [in], optional:
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
    quantizes_inputs: ClassVar[bool] = True
    transforms_inputs: ClassVar[bool] = True
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
        super().__init__()
        rank, dtype = 0 if branch is None else branch.rank, None if bias is None else bias.dtype
        factors = self._branch_dtype(branch)
        self._lay_out(grid.format, codes.shape, dtype, divisor is not None, rotation, rank, stored_dtype(grid), factors)
        self._check_branch(branch)
        self._fill(
            codes,
            grid,
            **{
                BIAS: bias,
                DIVISOR: None if divisor is None else divisor.astype(mx.float32),
                **self._factors(branch),
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
        _, width = shape
        if rotation != block_size(width, rotation):
            raise AdapterError(
                f"blocks of {rotation} cannot rotate an input of width {width}; expected a power of 4 that divides it"
            )
        self._rotation = rotation
        self._lay_out_weight(format, shape, bias, scales)
        if divisor:
            self[DIVISOR] = mx.zeros((width,), mx.float32)
        self._lay_out_branch(rank, factors)
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

    @property
    def rotation(self) -> int:
        """In blocks of how many channels the input is rotated; 1 where it is not."""
        return self._rotation

    @property
    def divisor(self) -> mx.array | None:
        """What the input's channels are divided by, float32 [in]."""
        return self.get(DIVISOR)

    def set_activations(self, table: ActivationTable, clock: Clock) -> None:
        if table.shift.shape[1] not in (1, self.width):
            raise AdapterError(
                f"activation shift of width {table.shift.shape[1]} does not fit an input of width {self.width}"
            )
        QuantizedInput.set_activations(self, table, clock)

    def _extra_repr(self) -> str:
        return f"{self._shape}, {self._format}, bias={BIAS in self}"

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] to [..., out], in x's dtype, rounded to it once."""
        return self.multiplied(x)

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

    @classmethod
    def read(cls, module: nn.Module, x: mx.array, *where: Any) -> LayerInputs:
        values = np.asarray(x.astype(mx.float32)).reshape(x.shape[0], -1, x.shape[-1])
        return LayerInputs.of_tokens(values)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        codes: Array,
        grid: Grid,
        divisor: mx.array | None = None,
        rotation: int = 1,
        branch: LowRank | None = None,
    ) -> QuantizedLinear:
        return cls(codes, grid, module.bias if BIAS in module else None, divisor, rotation, branch)

    def meet(self, rows: mx.array, weight: mx.array, *where: Any) -> mx.array:
        return rows @ weight.T

    def _folded(self, x: mx.array, shift: mx.array, centred: mx.array, *where: Any) -> mx.array:
        if shift.shape[-1] == 1:
            return super()._folded(x, shift, centred)
        return self._rescaled(
            self._multiply_packed(shift, *self.unit_scales()) if self._runs_packed else shift @ centred.T, shift, 1
        )

    def _multiply_packed(self, x: mx.array, scales: mx.array, biases: mx.array, *where: Any) -> mx.array:
        return mx.quantized_matmul(x, self.weight, scales, biases, group_size=self.packed_group, bits=self._format.bits)


def find_quantized(module: nn.Module) -> dict[str, QuantizedLinear]:
    """Every quantized linear layer of a module, embeddings among them, by path."""
    return {path: m for path, m in module.named_modules() if isinstance(m, QuantizedLinear)}
