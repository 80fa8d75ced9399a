"""Whether to divide the channels of an input, for the step-by-step pipeline: SmoothQuant, and TaQ-DiT's integer
migration after a GELU.

A division multiplies columns of the weight, so it is judged by the error of inputs and 4-bit weights together, at
unchanged bits; where it lowers that, the divided input gets bits of its own. Arrays only; ``sweep.folding`` and
``QuantizedLinear`` do the dividing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..grids.tables import ActivationTable
from ..grids.weights import WeightFormat, fit_extremes
from ..methods.inputs.shift import migration
from ..methods.inputs.tiers import lowered
from ..methods.transforms import smoothquant
from ..numerics.arrays import Array
from ..sweep.inputs import DecidedInput, Options, TierTables, mean_error

LayerTables = dict[str, ActivationTable]
WEIGHTS = WeightFormat(bits=4)


@dataclass(frozen=True)
class Division:
    """What dividing the input of ``layers`` (they read one tensor) by ``divisor`` [in] float32 would do.

    ``facts`` has the errors before and after. Where it was ``applied``, ``tables`` has each layer's table of the
    divided input.
    """

    layers: tuple[str, ...]
    divisor: Array
    applied: bool
    facts: dict[str, Any]
    tables: LayerTables


def try_division(
    layers: Mapping[str, DecidedInput],
    divisor: Array,
    options: Options,
    facts: dict[str, Any],
    one_tier_less: bool = False,
) -> Division:
    """Divide the input of layers that read one tensor, and apply that where it lowers their mean error at unchanged
    bits, with 4-bit weights rounded to nearest.

    The divided input then gets bits of its own: one tier fewer, or what the rule says of it.
    """
    choices, before, after = {}, [], []
    for path, decided in layers.items():
        shift = None if decided.shift is None else decided.shift / divisor
        choice = choices[path] = TierTables.of(decided.layer.divided(divisor), shift, options)
        before.append(mean_error(decided.layer, decided.table, nearest(decided.layer.weight)))
        after.append(mean_error(choice.layer, choice.at(decided.table.bits), nearest(choice.layer.weight)))
    applied = float(np.mean(after)) < float(np.mean(before))
    tables = {}
    for path, choice in choices.items() if applied else ():
        tables[path] = choice.at(lowered(layers[path].table.bits) if one_tier_less else choice.bits())
    facts = {**facts, "error_before": float(np.mean(before)), "error_after": float(np.mean(after))}
    return Division(tuple(layers), divisor, applied, facts, tables)


def nearest(weight: Array) -> Array:
    """A weight [out,in] rounded to nearest, 4 bits."""
    grid = fit_extremes(weight, WEIGHTS)
    return grid.dequantize(grid.quantize(weight))


def smoothed(layers: Mapping[str, DecidedInput], options: Options) -> Division | None:
    """SmoothQuant on the tensor that these layers read; None where it is no candidate. By thresholds it is worth one
    tier.
    """
    peaks = np.max([smoothquant.peaks(decided.layer.ranges) for decided in layers.values()], axis=0)
    if not smoothquant.candidate(peaks):
        return None
    facts = {"alpha": options.alpha, "ratio": smoothquant.spike(peaks)[0]}
    divisor = smoothquant.divisor(peaks, [decided.layer.weight for decided in layers.values()], options.alpha)
    return try_division(layers, divisor, options, facts, one_tier_less=options.rule == "threshold")


def migrated(path: str, decided: DecidedInput, options: Options) -> Division | None:
    """The integer migration of a shifted input; None where there is no shift, or no channel reaches further than the
    others.
    """
    if decided.shift is None:
        return None
    divisor = migration(decided.layer.ranges, decided.shift)
    if divisor.max() == 1:
        return None
    return try_division(
        {path: decided}, divisor, options, {"largest": int(divisor.max()), "channels": int((divisor > 1).sum())}
    )
