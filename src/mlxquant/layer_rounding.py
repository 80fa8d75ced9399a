"""One layer by its specification: its weight rounded, and the static scales of its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .activations import ActivationTable
from .errors import MlxQuantError
from .input_tables import LayerInput, Options, decide_input
from .layers import QuantizedLinear
from .methods import registry
from .methods.correction import corrected_target
from .methods.moments import Moments, output_error
from .methods.tiers import TIERS
from .recipe import ActivationSpec, LayerSpec
from .statistics import Collector, InputStatistics

Array = npt.NDArray[Any]
Statistics = Mapping[str, InputStatistics] | Collector  # of layers' inputs, by path


@dataclass(frozen=True)
class Rounded:
    """A quantized layer beside the weight [out,in] that it stands for, the one that its rounding aimed at, and its inputs' moments."""

    layer: QuantizedLinear
    weight: Array
    target: Array
    moments: Moments

    @property
    def error(self) -> float:
        """Relative output error on the calibration inputs."""
        return output_error(self.weight, self.layer.grid().dequantize(self.layer.codes()), self.moments)


@dataclass(frozen=True)
class Preset:
    """What was decided about a layer's input elsewhere: its table, and by what its channels are divided ([in], online)."""

    table: ActivationTable | None = None
    divisor: Array | None = None


def activation_table(seen: LayerInput, spec: ActivationSpec, layer: QuantizedLinear, after: str) -> ActivationTable:
    """The static scales of a layer's input by their specification.

    With a budget bits are chosen for the exact weight, and an input that was written ``after`` a GELU may be shifted by the centre of
    each channel. Fixed bits are for the rounded weight, that of ``layer``.
    """
    ranges = seen.ranges
    if spec.budget is None:
        return registry.get("range", spec.range).function(ranges, np.array(layer.dequantized()), spec.bits)
    centre = (ranges.least + ranges.most) / 2 if after == "gelu" else None
    return decide_input(seen, centre, tier_options(spec)).table


def tier_options(spec: ActivationSpec) -> Options:
    """How a specification with a budget chooses: never more bits than it says."""
    assert spec.budget is not None
    return Options(budget=spec.budget, range=spec.range, tiers=tuple(bits for bits in TIERS if bits <= spec.bits))


def quantize_layer(linear: nn.Linear, spec: LayerSpec, statistics: Statistics, path: str, preset: Preset) -> Rounded:
    """The weight of one layer by its specification; errors name the layer."""
    weight = np.array(linear.weight.astype(mx.float32)).astype(np.float64)
    moments: Moments = statistics[path].moments
    if preset.divisor is not None:
        weight, moments = weight * preset.divisor, moments.divided(preset.divisor)
    try:
        target = corrected_target(weight, moments) if spec.corrected else weight
        grid = registry.get("steps", spec.steps).function(target, spec.weight, moments)
        codes = registry.get("round", spec.rounding).function(target, grid, moments)
    except MlxQuantError as error:
        raise type(error)(f"layer {path}: {error}") from error
    bias = linear.bias if "bias" in linear else None
    divisor = None if preset.divisor is None else mx.array(preset.divisor, mx.float32)
    return Rounded(QuantizedLinear(codes, grid, bias, divisor), weight, target, moments)
