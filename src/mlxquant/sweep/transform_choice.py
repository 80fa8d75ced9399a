"""Which of the transforms that a method proposes a tensor gets: the one with the least predicted error in the outputs
of the layers that read it.

The error is predicted on sampled inputs, with weights rounded to nearest in the layers' formats and inputs quantized
over their extremes: cheap enough to try everything that is proposed. Whether it helps the whole block is for the sweep
to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..methods import registry
from ..methods.inputs.tiers import OutputErrors
from ..numerics.moments import Moments
from ..numerics.transform import Parts, Place, Transform
from ..recipes.recipe import LayerSpec
from .inputs import LayerInput


@dataclass(frozen=True)
class Consumer:
    """A layer that reads a tensor: its input, what becomes of it, and what the layer's weight is now.

    Where the tensor is a ``part`` of what the layer reads, ``others`` are the transforms of other parts.
    """

    seen: LayerInput
    spec: LayerSpec
    part: slice = field(default_factory=lambda: slice(None))
    others: Parts = field(default_factory=Parts)


@dataclass(frozen=True)
class Proposal:
    """A tensor's transform, perhaps unchanged, and its consumers' mean predicted error before and after."""

    transform: Transform
    before: float
    after: float

    @property
    def facts(self) -> dict[str, Any]:
        return {"error_before": self.before, "error_after": self.after}


def propose(
    method: str,
    consumers: Sequence[Consumer],
    place: Place,
    current: Transform,
    allowed: Callable[[Transform], bool] = lambda transform: True,
) -> Proposal:
    """The best of what a registered transform proposes for a tensor that has ``current`` already; ``current`` where
    nothing that is ``allowed`` is better.
    """
    first, weights = _seen(consumers[0], current).ranges, [_seen(consumer, current).weight for consumer in consumers]
    best = before = _error(consumers, current)
    chosen = current
    for candidate in registry.get("transform", method).function(first, weights, place):
        transform = current.then(candidate)
        if not allowed(transform):
            continue
        error = _error(consumers, transform)
        if error < best:
            best, chosen = error, transform
    return Proposal(chosen, before, best)


def _seen(consumer: Consumer, transform: Transform) -> LayerInput:
    """The tensor, transformed, and what of the consumer's weight reads it."""
    transformed = consumer.others.then(consumer.part, transform)
    ranges, weight = transformed.ranges(consumer.seen.ranges), transformed.weight(consumer.seen.weight)
    return LayerInput(ranges.part(consumer.part), weight[:, consumer.part])


def _error(consumers: Sequence[Consumer], transform: Transform) -> float:
    """The consumers' mean output error with a transform, averaged over noise levels."""
    errors = []
    for consumer in consumers:
        spec, transformed = consumer.spec, consumer.others.then(consumer.part, transform)
        weight, ranges = transformed.weight(consumer.seen.weight), transformed.ranges(consumer.seen.ranges)
        power = np.square(ranges.rows.reshape(-1, weight.shape[1])).sum(0, dtype=np.float64)
        grid = registry.get("steps", spec.steps).function(weight, spec.weight, Moments(np.diag(power), len(power)))
        rounded = grid.dequantize(grid.quantize(weight))
        table = None
        if spec.activation is not None:
            table = registry.get("range", "extremes").function(ranges, weight, spec.activation.bits)
        errors.append(np.mean(OutputErrors(ranges, weight, consumer.seen.costs)(table, rounded)))
    return float(np.mean(errors))
