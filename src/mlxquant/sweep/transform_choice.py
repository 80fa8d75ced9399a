"""Which of the transforms that a method proposes a tensor gets: the one with the least predicted error in the outputs
of the layers that read it.

The error is predicted on sampled inputs, with weights rounded to nearest in the layers' formats and inputs quantized
over their extremes: cheap enough to try everything that is proposed. Whether it helps the whole block is for the sweep
to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..methods import registry
from ..methods.inputs.tiers import OutputErrors
from ..numerics.moments import Moments
from ..numerics.transform import Place, Transform
from ..recipes.recipe import LayerSpec
from .inputs import LayerInput


@dataclass(frozen=True)
class Consumer:
    """A layer that reads a tensor: its input, what becomes of it, and what the layer's weight is now."""

    seen: LayerInput
    spec: LayerSpec


@dataclass(frozen=True)
class Proposal:
    """A tensor's transform, perhaps unchanged, and its consumers' mean predicted error before and after."""

    transform: Transform
    before: float
    after: float

    @property
    def facts(self) -> dict[str, Any]:
        return {"error_before": self.before, "error_after": self.after}


def propose(method: str, consumers: Sequence[Consumer], place: Place, current: Transform) -> Proposal:
    """The best of what a registered transform proposes for a tensor that has ``current`` already; ``current`` where
    nothing is better.
    """
    first = current.ranges(consumers[0].seen.ranges)
    weights = [current.weight(consumer.seen.weight) for consumer in consumers]
    best = before = _error(consumers, current)
    chosen = current
    for candidate in registry.get("transform", method).function(first, weights, place):
        transform = current.then(candidate)
        error = _error(consumers, transform)
        if error < best:
            best, chosen = error, transform
    return Proposal(chosen, before, best)


def _error(consumers: Sequence[Consumer], transform: Transform) -> float:
    """The consumers' mean output error with a transform, averaged over noise levels."""
    errors = []
    for consumer in consumers:
        spec, weight = consumer.spec, transform.weight(consumer.seen.weight)
        ranges = transform.ranges(consumer.seen.ranges)
        power = np.square(ranges.rows.reshape(-1, weight.shape[1])).sum(0, dtype=np.float64)
        grid = registry.get("steps", spec.steps).function(weight, spec.weight, Moments(np.diag(power), len(power)))
        rounded = grid.dequantize(grid.quantize(weight))
        table = None
        if spec.activation is not None:
            table = registry.get("range", "extremes").function(ranges, weight, spec.activation.bits)
        errors.append(np.mean(OutputErrors(ranges, weight, consumer.seen.costs)(table, rounded)))
    return float(np.mean(errors))
