"""A table of embeddings in integer codes. Looked up or used as the output layer, it reads the same codes.

MLX has a ``nn.QuantizedEmbedding``, but it answers in the dtype of its scales: float16 scales, which are ours bit for
bit, would make a bfloat16 model run in float16, and bfloat16 ones are others than those that the codes were rounded on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files import schema
from ..grids.packing import dequantized
from ..grids.time import Clock
from ..grids.weights import Grid, WeightFormat
from ..numerics.arrays import Array
from ..numerics.layer_inputs import LayerInputs
from ..numerics.low_rank import LowRank
from .linear import QuantizedLinear
from .names import DOWN, UP
from .packed import name_of
from .weight_only import rounded


class QuantizedEmbedding(QuantizedLinear):
    """A table of embeddings: the parameters of a ``QuantizedLinear`` without a bias; ``as_linear`` is what that layer
    computes.

    Args:
        codes: Codes of the table, uint8 [number, dims].
        grid: The levels that the codes stand for.
        dtype: In which rows come that are looked up.
        branch: What is added to the integer table, never quantized; None for nothing.
    """

    replaces = nn.Embedding
    quantizes_inputs = False
    transforms_inputs = False
    tells_outputs = False  # a row that is looked up is an output

    def __init__(self, codes: Array, grid: Grid, dtype: mx.Dtype = mx.float32, branch: LowRank | None = None):
        super().__init__(codes, grid, branch=branch)
        self._dtype = dtype

    @classmethod
    def outputs(cls, module: nn.Module) -> int:
        return int(module.weight.shape[1])

    @classmethod
    def reads(cls, module: nn.Module) -> Any:
        return cls, module.weight.shape[0]

    @classmethod
    def read(cls, module: nn.Module, x: mx.array, *where: Any) -> LayerInputs:
        """A row is looked up as it is: no input mixes its numbers with each other, and none with those of other
        rows.
        """
        counts = np.bincount(np.asarray(x).ravel(), minlength=module.weight.shape[0])
        return LayerInputs([], looked_up=counts.astype(np.float64))

    @classmethod
    def of(
        cls,
        module: nn.Module,
        codes: Array,
        grid: Grid,
        divisor: mx.array | None = None,
        rotation: int = 1,
        branch: LowRank | None = None,
    ) -> QuantizedEmbedding:
        return cls(codes, grid, module.weight.dtype, branch)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, format: WeightFormat, steps: str = "extremes"
    ) -> QuantizedEmbedding:
        """What stands for ``embedding``, in its dtype.

        Args:
            embedding: The table; it stays as it is.
            format: The grid's.
            steps: As for ``QuantizedConvolution``.

        Raises:
            NumericsError: On NaN or infinite weights.
            RecipeError: When groups do not divide the width.
        """
        return cls(*rounded(embedding.weight, format, steps), embedding.weight.dtype)

    STRUCTURE = schema.every(QuantizedLinear.STRUCTURE, schema.entries({"dtype": schema.floating}))

    @property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "dtype": name_of(self._dtype)}

    @classmethod
    def blank(cls, facts: Mapping[str, Any], clock: Clock | None) -> Self:
        layer = super().blank(facts, clock)
        layer._dtype = getattr(mx, facts["dtype"])
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        """Integers x [...] to rows [..., dims], in the dtype of the embedding that this stands for."""
        places = x.reshape(x.size)
        scales, biases = (v if v.shape[0] == 1 else v[places] for v in self.scales_and_biases())
        rows = dequantized(self.weight[places], scales, biases, self.format.bits, self.width)
        if UP in self:
            rows = rows + self[UP][places].astype(mx.float32) @ self[DOWN].astype(mx.float32)
        return rows.reshape(*x.shape, self.width).astype(self._dtype)

    def looked_up(self, x: mx.array, weight: mx.array) -> mx.array:
        """What ``__call__`` answers with another table float32 [number, dims] in the place of the codes."""
        rows = weight[x]
        if UP in self:
            rows = rows + self[UP][x].astype(mx.float32) @ self[DOWN].astype(mx.float32)
        return rows.astype(self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """The embedding as the output layer: an input times the whole table.

        Args:
            x: [..., dims].

        Returns:
            [..., number], in x's dtype.
        """
        return super().__call__(x)
