"""The noise floor: how far a model's pictures move when it merely computes in 16 bits. No quantized model can be told
from full precision below that.

Weights, and what every Linear reads and writes, are rounded to float16; sums are in float32, as matrix units have it.
On a GPU that is what float16 does there; on the CPU, whose float16 matmuls are slow loops, the figure costs no more
than another picture.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..api.model import Model
from ..layers.tree import find_linears, set_module


class HalfLinear(nn.Module):
    """A Linear with its weight, input and output rounded to float16; the result is in the input's dtype."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self._linear = linear

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] to [..., out]."""
        y = rounded(x) @ rounded(self._linear.weight).T
        if "bias" in self._linear:
            y = y + rounded(self._linear.bias)
        return rounded(y).astype(x.dtype)


def rounded(x: mx.array) -> mx.array:
    """The nearest float16, as float32; beyond 65504 infinite."""
    return x.astype(mx.float16).astype(mx.float32)


def half_precision(model: Model) -> Model:
    """A copy that computes in float16 as above; the weights are shared. Quantized layers stay as they are."""
    adapter = model.clone()
    for path, linear in find_linears(adapter.module).items():
        set_module(adapter.module, path, HalfLinear(linear))
    return Model(adapter)
