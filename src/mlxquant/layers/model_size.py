"""How large a quantized model is where it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from .linear import QuantizedLinear
from .names import FOR_WEIGHT


@dataclass(frozen=True)
class Size:
    """Stored size of a model. ``bits_per_weight`` is stored bits over parameters of the whole model, as mlx-lm prints
    it; ``bits_per_quantized_weight`` is over the quantized layers alone: codes, scales and biases.
    """

    model_bytes: int
    bits_per_weight: float
    bits_per_quantized_weight: float

    @classmethod
    def of(cls, layers: Mapping[str, QuantizedLinear], arrays: Mapping[str, mx.array]) -> Size:
        """``arrays`` are everything that is stored, those of the ``layers`` among them."""
        codes = sum(layer.nbytes for layer in layers.values())
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
        tables = sum(value.size for name, value in arrays.items() if ".act_" in name)
        packed = sum(v.size for layer in layers.values() for k, v in layer.items() if k in FOR_WEIGHT)
        total = sum(v.size for v in arrays.values()) - packed - tables + weights
        stored = sum(v.nbytes for v in arrays.values())
        return cls(stored, 8 * stored / total, 8 * codes / weights)
