"""One layer's weight by its specification: branch, steps, codes and dampings. What becomes of its input is
``inputs``'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import MlxQuantError
from ..grids.tables import ActivationTable
from ..grids.weights import Grid
from ..layers.linear import QuantizedLinear
from ..methods import registry
from ..methods.weights.correction import corrected_target
from ..methods.weights.damping import CANDIDATES, TARGETS, ChosenDamping, choose_damping
from ..methods.weights.lowrank import refitted
from ..numerics.arrays import Array
from ..numerics.low_rank import LowRank
from ..numerics.moments import Moments, output_error
from ..numerics.transform import Transform
from ..recipes.recipe import LayerSpec


@dataclass(frozen=True)
class Dampings:
    """Chosen dampings of the corrected ``target``, of the ``rounding`` and of a ``branch``, None where it is the
    method's own.
    """

    target: float | None = None
    rounding: float | None = None
    branch: float | None = None

    @property
    def facts(self) -> dict[str, float]:
        named = {"target_damping": self.target, "damping": self.rounding, "branch_damping": self.branch}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Rounded:
    """A quantized layer beside its codes uint8 [out,in], the weight [out,in] that it stands for, that which its codes
    aimed at, and its inputs' moments.

    The layer holds the codes as well, but packed: whoever compares them or learns from them takes them from here. The
    aim differs from the weight where it is corrected, or where a branch takes a part of it.
    """

    layer: QuantizedLinear
    codes: Array
    weight: Array
    target: Array
    moments: Moments
    dampings: Dampings

    def with_codes(self, codes: Array) -> Rounded:
        """The same layer with other codes uint8 [out,in]."""
        return replace(self, layer=self.layer.with_codes(codes), codes=codes)

    @property
    def error(self) -> float:
        """Relative output error on the calibration inputs."""
        quantized = self.layer.grid().dequantize(self.codes)
        branch = self.layer.branch
        return output_error(self.weight, quantized if branch is None else quantized + branch.weight, self.moments)


@dataclass(frozen=True)
class Preset:
    """What was decided about a layer's input elsewhere: its table, and by what its channels are divided ([in],
    online).
    """

    table: ActivationTable | None = None
    divisor: Array | None = None


def quantize_layer(linear: nn.Linear, spec: LayerSpec, moments: Moments, path: str, transform: Transform) -> Rounded:
    """The weight of one layer by its specification; errors name the layer at ``path``.

    ``transform`` is what the layer does to its input while it runs, and ``moments`` are of inputs that went through it.
    """
    weight = transform.weight(np.array(linear.weight.astype(mx.float32)).astype(np.float64))
    try:
        dampings = _choose_dampings(weight, spec, moments)
        target, branch, grid, codes = _quantized(weight, spec, moments, dampings)
    except MlxQuantError as error:
        raise type(error)(f"layer {path}: {error}") from error
    dampings = dampings if branch is None else replace(dampings, branch=branch.damping)
    bias = linear.bias if "bias" in linear else None
    divisor = None if transform.divisor is None else mx.array(transform.divisor, mx.float32)
    layer = QuantizedLinear(codes, grid, bias, divisor, transform.block, branch)
    return Rounded(layer, np.ascontiguousarray(codes, np.uint8), weight, target, moments, dampings)


def _choose_dampings(weight: Array, spec: LayerSpec, moments: Moments) -> Dampings:
    """Where a specification wants it, by held-out tokens: first that of the corrected target, then, with it, that of
    the rounding.
    """
    chosen = Dampings()
    if spec.held_out and spec.corrected:
        chosen = Dampings(target=_damping(choose_damping(weight, corrected_target, moments, TARGETS)))
    if spec.held_out and registry.get("round", spec.rounding).damped:

        def quantize(rows: Array, seen: Moments, damping: float) -> Array:
            _, branch, grid, codes = _quantized(rows, spec, seen, replace(chosen, rounding=damping))
            return grid.dequantize(codes) if branch is None else grid.dequantize(codes) + branch.weight

        candidates = TARGETS if registry.get("round", spec.rounding).cross else CANDIDATES
        chosen = replace(chosen, rounding=_damping(choose_damping(weight, quantize, moments, candidates)))
    return chosen


def _damping(choice: ChosenDamping | None) -> float | None:
    return None if choice is None else choice.damping


def _quantized(
    weight: Array, spec: LayerSpec, moments: Moments, dampings: Dampings
) -> tuple[Array, LowRank | None, Grid, Array]:
    """What the integers of a weight [rows,in] aim at, the branch beside them, their grid and their codes uint8
    [rows,in].
    """
    aim = {} if dampings.target is None else {"damping": dampings.target}
    target = corrected_target(weight, moments, **aim) if spec.corrected else weight
    options = {} if dampings.rounding is None else {"damping": dampings.rounding}

    def rounded(values: Array, seen: Moments | None = moments) -> tuple[Grid, Array]:
        grid = registry.get("steps", spec.steps).function(values, spec.weight, seen)
        codes = registry.get("round", spec.rounding).function(values, grid, seen, **options)
        if spec.refine is None:
            return grid, codes
        refined: tuple[Grid, Array] = registry.get("refine", spec.refine).function(values, grid, codes, seen, **options)
        return refined

    def dequantized(values: Array, seen: Moments | None) -> Array:
        grid, codes = rounded(values, seen)
        return grid.dequantize(codes)

    if spec.branch is None:
        return target, None, *rounded(target)
    rank = min(spec.rank, *weight.shape)
    branch = registry.get("branch", spec.branch).function(target, moments, rank, dequantized)
    grid, codes = rounded(target - branch.weight)
    branch = refitted(branch, target, grid.dequantize(codes), moments)  # to what the rounding has left
    return target - branch.weight, branch, grid, codes
