"""Put a transform of a tensor into the weights around it, so that the model computes what it computed before.

``(X / d) (W diag d)^T = X W^T``: the consumers' columns are multiplied by d, and what writes the tensor divides by d
instead; channels that are mixed or change places are treated alike. Methods choose the transform; adapters know, as
edges, what writes the tensor: rows of Linears, or gains and biases of norms, which can only be divided. What nothing
can absorb is left alone here, and the layer that replaces the consumer does it while it runs (``QuantizedLinear``).
Where an edge is about some of its consumers' columns, the others stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import AdapterError, NumericsError
from ..layers.tree import get_module
from ..models.adapter import Adapter
from ..models.edges import Edge, Fold, check_edges
from ..models.stages import State
from ..numerics.arrays import Array
from ..numerics.hadamard import block_size
from ..numerics.transform import Transform

Undo = Callable[[], None]
Gains = dict[str, mx.array]  # of norms, by path and name of the parameter: what is folded into them stays in the model


def divide(module: nn.Module, edge: Edge, divisor: Array) -> Undo:
    """Divide the edge's tensor by ``divisor`` [in] float32 > 0, in place; see ``fold``. ValueError for an edge without
    folds.
    """
    if not edge.folds:
        raise ValueError(f"nothing can absorb a division before {edge.name}; divide while the model runs")
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
        raise ValueError(f"what writes the input of {edge.name} cannot absorb all of this transform")
    width = len(range(get_module(module, edge.consumers[0]).weight.shape[-1])[edge.part])
    divisor = transform.divisor
    if divisor is not None and (divisor.shape != (width,) or not np.isfinite(divisor).all() or np.any(divisor <= 0)):
        raise NumericsError(
            f"{edge.name}: a divisor of shape {divisor.shape} must be positive and finite for {width} channels"
        )
    changed = producers(edge, transform)
    layers = {path: get_module(module, path) for path in (*edge.consumers, *(where.path for where in changed))}
    before = {path: (layer.weight, layer.bias if "bias" in layer else None) for path, layer in layers.items()}

    def undo() -> None:
        for path, (weight, bias) in before.items():
            layers[path].weight = weight
            if bias is not None:
                layers[path].bias = bias

    try:
        for path in edge.consumers:
            weight = np.array(layers[path].weight.astype(mx.float32))
            rows = weight.reshape(-1, weight.shape[-1])  # a view; also of experts, and of convolutions of one pixel
            rows[:, edge.part] = transform.weight(rows[:, edge.part])
            layers[path].weight = mx.array(weight).astype(layers[path].weight.dtype)
        for where in changed:
            _change_rows(layers[where.path], where, transform)
    except BaseException:
        undo()
        raise
    return undo


def is_norm(module: nn.Module, where: Fold) -> bool:
    """Whether gains are what it is about."""
    return get_module(module, where.path).weight.ndim == 1


def gains_of(module: nn.Module, edge: Edge) -> Gains:
    """Gains and biases of the norms that write an edge's tensor."""
    norms = {where.path: get_module(module, where.path) for where in edge.folds if is_norm(module, where)}
    return {f"{path}.{name}": norm[name] for path, norm in norms.items() for name in ("weight", "bias") if name in norm}


def set_gains(module: nn.Module, gains: Gains) -> Gains:
    """Give norms other gains and biases, in place; returns those that they had."""
    before = Gains()
    for name, value in gains.items():
        path, _, kind = name.rpartition(".")
        norm = get_module(module, path)
        before[name], norm[kind] = norm[kind], value
    return before


@contextmanager
def gained(module: nn.Module, gains: Gains) -> Iterator[None]:
    """Run with other gains in norms; they have their own afterwards, also after an exception."""
    before = set_gains(module, gains)
    try:
        yield
    finally:
        set_gains(module, before)


def _change_rows(layer: nn.Module, where: Fold, transform: Transform) -> None:
    """Rows [start, stop) of a Linear write ``T(y)`` from now on, or, used as 1 + y, ``T(1 + y) - 1``; a norm has ``T``
    of its gains and biases.
    """
    weight = np.array(layer.weight.astype(mx.float32))
    norm, rows = weight.ndim == 1, slice(where.start, where.stop)
    if norm and (transform.order is not None or transform.block > 1):
        raise ValueError(f"{where.path} is a norm, which can absorb a division and neither a mixing nor an order")
    if where.plus_one and not norm and "bias" not in layer:
        raise NumericsError("a Linear without bias cannot absorb the division of 1 + y")
    weight[rows] = _applied(transform, weight[rows].T, where.plus_one and norm).T
    layer.weight = mx.array(weight).astype(layer.weight.dtype)
    if "bias" in layer:
        bias = np.array(layer.bias.astype(mx.float32))
        bias[rows] = _applied(transform, bias[rows], where.plus_one and not norm)
        layer.bias = mx.array(bias).astype(layer.bias.dtype)


def _applied(transform: Transform, y: Array, plus_one: bool) -> Array:
    return transform.inputs(y + 1) - 1 if plus_one else transform.inputs(y)


def check_folds(adapter: Adapter, state: State, sigma: float, tolerance: float = 0.01) -> None:
    """See whether an adapter's edges tell the truth: fold what each says that its producers absorb (a division, an
    order, a mixing) into the model, and look whether it still predicts the same. Everything is as it was afterwards.

    Args:
        adapter: The model, in full precision.
        state: What enters its first stage; one sample is enough.
        sigma: The noise level.
        tolerance: How far the prediction may move, relative to itself, because folded weights are rounded.

    Raises:
        AdapterError: An edge cannot be as it says, or lies; it says which, and how far the prediction moved.
    """
    edges = adapter.edges()
    check_edges(adapter.name, adapter.module, edges)
    exact = adapter.run(state, sigma)
    for edge in edges:
        for what, transform in _absorbed(adapter.module, edge).items():
            undo = fold(adapter.module, edge, transform)
            try:
                folded = adapter.run(state, sigma)
            finally:
                undo()
            moved = float(np.max([_distance(folded[key], exact[key]) for key in exact]))
            if not moved <= tolerance:
                raise AdapterError(
                    f"{adapter.name}: the edge into {edge.name} is not true: with its channels {what} in all that it"
                    f" names, the prediction moves by {moved:.2g} of itself; correct the adapter's edges"
                )


def _absorbed(module: nn.Module, edge: Edge) -> dict[str, Transform]:
    """One of each kind of transform that an edge says its producers absorb, by what it does to channels."""
    random, found = np.random.default_rng(0), dict[str, Transform]()
    width = len(range(get_module(module, edge.consumers[0]).weight.shape[-1])[edge.part])
    if edge.folds:
        found["divided"] = Transform(random.uniform(0.5, 2, width).astype(np.float32))
        if (block := block_size(edge.mixes)) > 1:
            found["mixed"] = Transform(block=block)
    if edge.reorders:
        found["put in another order"] = Transform(order=random.permutation(width))
    return found


def _distance(x: mx.array, exact: mx.array) -> float:
    """|x - exact| / |exact|; of what is no number 0."""
    if not mx.issubdtype(exact.dtype, mx.floating):
        return 0.0
    exact = exact.astype(mx.float32)
    return float(mx.linalg.norm(x.astype(mx.float32) - exact) / mx.maximum(mx.linalg.norm(exact), 1e-30))
