"""Divide the channels of a tensor inside a model without changing what the model computes.

``(X / d) (W diag d)^T = X W^T``: the consumers' columns are multiplied by d, and what writes the tensor divides by d instead. Methods
choose d; adapters know, as edges, what writes the tensor. Where nothing can absorb the division the consumers are left alone, and
the layer that replaces them divides while it runs (``QuantizedLinear.act_divisor``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .errors import NumericsError
from .models.adapter import Edge
from .rewrite import get_module

Array = npt.NDArray[Any]


def divide(module: nn.Module, edge: Edge, divisor: Array) -> Callable[[], None]:
    """Divide the edge's tensor by ``divisor`` [in] float32 > 0, in place; returns what undoes it exactly.

    Producers' rows and biases are divided (where they are used as 1 + y, so is the 1), consumers' columns multiplied. Raises
    NumericsError when a divisor is not positive and finite or its width is wrong, ValueError for an edge without folds.
    """
    if not edge.folds:
        raise ValueError(f"nothing can absorb a division before {edge.consumers[0]}; divide while the model runs")
    width = get_module(module, edge.consumers[0]).weight.shape[1]
    if divisor.shape != (width,) or not np.isfinite(divisor).all() or np.any(divisor <= 0):
        raise NumericsError(f"{edge.consumers[0]}: a divisor of shape {divisor.shape} must be positive and finite for {width} channels")
    layers = {path: get_module(module, path) for path in (*edge.consumers, *(fold.path for fold in edge.folds))}
    before = {path: (layer.weight, layer.bias if "bias" in layer else None) for path, layer in layers.items()}
    d = mx.array(divisor.astype(np.float32))
    for path in edge.consumers:
        layers[path].weight = (layers[path].weight.astype(mx.float32) * d).astype(layers[path].weight.dtype)
    for fold in edge.folds:
        _divide_rows(layers[fold.path], fold.start, fold.stop, fold.plus_one, d)

    def undo() -> None:
        for path, (weight, bias) in before.items():
            layers[path].weight = weight
            if bias is not None:
                layers[path].bias = bias

    return undo


def _divide_rows(layer: nn.Linear, start: int, stop: int, plus_one: bool, d: mx.array) -> None:
    """Rows [start, stop) of a Linear write ``y / d`` from now on, or ``(1 + y) / d - 1``."""
    if plus_one and "bias" not in layer:
        raise NumericsError("a Linear without bias cannot absorb the division of 1 + y")
    weight = layer.weight.astype(mx.float32)
    rows = weight[start:stop] / d[:, None]
    layer.weight = mx.concatenate([weight[:start], rows, weight[stop:]]).astype(layer.weight.dtype)
    if "bias" in layer:
        bias = layer.bias.astype(mx.float32)
        own = (bias[start:stop] + 1) / d - 1 if plus_one else bias[start:stop] / d
        layer.bias = mx.concatenate([bias[:start], own, bias[stop:]]).astype(layer.bias.dtype)
