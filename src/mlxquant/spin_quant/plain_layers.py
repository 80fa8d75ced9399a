"""The plain layers of MLX behind layers that are quantized already.

A rotation turns weights of floats. A GPT that was trained through rounding has none: what it has learned is what it
computes with its rounded weights. Those are turned, so that the function stays the same, and rounded again afterwards.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..layers.embeddings import QuantizedEmbedding
from ..layers.linear import QuantizedLinear
from ..layers.names import TOKEN
from ..qat.integer import RowParts
from ..qat.modules import QuantizingEmbedding, QuantizingLinear


def plain(layer: Any) -> nn.Linear | nn.Embedding | None:
    """The layer of MLX that computes what ``layer`` does, with the weight that it multiplies by now, float32 where it
    is rounded: itself where it is plain, None where there is none (its input is quantized or changed, too).
    """
    if type(layer) in (nn.Linear, nn.Embedding):
        return layer
    if isinstance(layer, QuantizingEmbedding):
        return _embedding(layer.rounded(mx.float32))
    if isinstance(layer, QuantizingLinear):
        return _linear(layer.rounded(mx.float32), layer.get("bias"))
    if isinstance(layer, RowParts):
        return _stacked([plain(part) for part in layer.parts])
    if isinstance(layer, QuantizedLinear) and _has_weights_only(layer):
        weight = layer.dequantized()
        return _embedding(weight) if isinstance(layer, QuantizedEmbedding) else _linear(weight, layer.get("bias"))
    return None


def _has_weights_only(layer: QuantizedLinear) -> bool:
    """Whether a layer reads its input as it is, and all of its weight is in its integers."""
    return (
        layer.table is None and TOKEN not in layer and layer.divisor is None and layer.rotation == 1 and not layer.rank
    )


def _stacked(parts: list[nn.Linear | nn.Embedding | None]) -> nn.Linear | None:
    """One linear with the rows of several."""
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    if len(linears) < len(parts):
        return None
    biases = [part.bias for part in linears if "bias" in part]
    return _linear(
        mx.concatenate([part.weight for part in linears]),
        mx.concatenate(biases) if len(biases) == len(linears) else None,
    )


def _linear(weight: mx.array, bias: mx.array | None) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=bias is not None)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def _embedding(weight: mx.array) -> nn.Embedding:
    embedding = nn.Embedding(1, 1)
    embedding.weight = weight
    return embedding
