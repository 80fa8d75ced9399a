"""Put a transform of a tensor into the weights around it, so that the model computes what it computed before.

``(X / d) (W diag d)^T = X W^T``: the consumers' columns are multiplied by d, and what writes the tensor divides by d
instead; channels that are mixed or change places are treated alike. Methods choose the transform; adapters know, as
edges, what writes the tensor. What nothing can absorb is left alone here, and the layer that replaces the consumer does
it while it runs (``QuantizedLinear``).
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import NumericsError
from ..layers.tree import get_module
from ..models.edges import Edge, Fold
from ..numerics.arrays import Array
from ..numerics.transform import Transform

Undo = Callable[[], None]


def divide(module: nn.Module, edge: Edge, divisor: Array) -> Undo:
    """Divide the edge's tensor by ``divisor`` [in] float32 > 0, in place; see ``fold``. ValueError for an edge without
    folds.
    """
    if not edge.folds:
        raise ValueError(f"nothing can absorb a division before {edge.consumers[0]}; divide while the model runs")
    return fold(module, edge, Transform(divisor))


def foldable(edge: Edge, transform: Transform) -> Transform:
    """The part of a transform that the edge's producers can absorb, in place of which its consumers then need only
    ``remaining``.
    """
    divides = transform.divisor is not None and bool(edge.folds)
    reorders = transform.order is not None and bool(edge.reorders)
    mixes = transform.block > 1 and edge.mixes % transform.block == 0 and transform.order is None
    return Transform(
        transform.divisor if divides else None,
        transform.order if reorders else None,
        transform.block if mixes and edge.folds else 1,
    )


def remaining(transform: Transform, folded: Transform) -> Transform:
    """What of a transform the consumers have to do while they run, once ``folded`` is in the producers.

    Raises ValueError when that is a change of order: no layer does that while it runs.
    """
    if transform.order is not None and folded.order is None:
        raise ValueError("nothing can absorb the new order of the channels")
    divisor = None if folded.divisor is not None else transform.divisor
    if divisor is not None and folded.order is not None:
        divisor = divisor[folded.order]
    return Transform(divisor, None, 1 if folded.block > 1 else transform.block)


def producers(edge: Edge, transform: Transform) -> tuple[Fold, ...]:
    """Who absorbs a transform that is ``foldable``."""
    return edge.reorders if transform.order is not None else edge.folds


def fold(module: nn.Module, edge: Edge, transform: Transform) -> Undo:
    """Fold a transform into the edge's producers and the columns of its consumers, in place; returns what undoes it
    exactly.

    Producers' rows and biases are divided (where they are used as 1 + y, so is the 1), put in order and rotated,
    consumers' columns to match. Raises NumericsError when a divisor is not positive and finite or its width is wrong,
    ValueError when the transform is more than ``foldable``.
    """
    absorbed = foldable(edge, transform)
    if (
        any(getattr(absorbed, name) is not getattr(transform, name) for name in ("divisor", "order"))
        or absorbed.block != transform.block
    ):
        raise ValueError(f"what writes the input of {edge.consumers[0]} cannot absorb all of this transform")
    width = get_module(module, edge.consumers[0]).weight.shape[1]
    divisor = transform.divisor
    if divisor is not None and (divisor.shape != (width,) or not np.isfinite(divisor).all() or np.any(divisor <= 0)):
        raise NumericsError(
            f"{edge.consumers[0]}: a divisor of shape {divisor.shape} must be positive and finite for {width} channels"
        )
    changed = producers(edge, transform)
    layers = {path: get_module(module, path) for path in (*edge.consumers, *(where.path for where in changed))}
    before = {path: (layer.weight, layer.bias if "bias" in layer else None) for path, layer in layers.items()}
    for path in edge.consumers:
        weight = np.array(layers[path].weight.astype(mx.float32))
        layers[path].weight = mx.array(transform.weight(weight)).astype(layers[path].weight.dtype)
    for where in changed:
        _change_rows(layers[where.path], where, transform)

    def undo() -> None:
        for path, (weight, bias) in before.items():
            layers[path].weight = weight
            if bias is not None:
                layers[path].bias = bias

    return undo


def _change_rows(layer: nn.Linear, where: Fold, transform: Transform) -> None:
    """Rows [start, stop) of a Linear write ``T(y)`` from now on, or, used as 1 + y, ``T(1 + y) - 1``."""
    if where.plus_one and "bias" not in layer:
        raise NumericsError("a Linear without bias cannot absorb the division of 1 + y")
    rows = slice(where.start, where.stop)
    weight = np.array(layer.weight.astype(mx.float32))
    weight[rows] = transform.inputs(weight[rows].T).T
    layer.weight = mx.array(weight).astype(layer.weight.dtype)
    if "bias" in layer:
        bias = np.array(layer.bias.astype(mx.float32))
        bias[rows] = transform.inputs(bias[rows] + 1) - 1 if where.plus_one else transform.inputs(bias[rows])
        layer.bias = mx.array(bias).astype(layer.bias.dtype)
