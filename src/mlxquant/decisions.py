"""Where activation statistics become decisions: bits, shifts and divisions of every layer's input.

A tier rule chooses the bits; the post-GELU shift is taken where it lowers the layer's output error, SmoothQuant and the integer
migration where they lower the error of inputs and 4-bit weights together. Everything that was compared is recorded, also where it was
not taken. Methods see arrays and the adapter names the layers; only this file knows both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .activations import ActivationTable
from .artifacts import versions
from .errors import CalibrationError, RecipeError
from .formats import WeightFormat, fit_extremes
from .methods import registry, smoothquant
from .methods.shift import centred, migration, shifted
from .methods.tiers import TIERS, OutputErrors, combined_errors, lowered, mixed, rms
from .models.adapter import Adapter, Edge
from .pipeline.quant_config import Division, QuantConfig
from .progress import Progress, silent
from .statistics import InputRanges

Array = npt.NDArray[Any]
WEIGHTS = WeightFormat(bits=4)


class Statistics(Protocol):
    """What is asked of activation statistics; ``pipeline.activation_stats.ActivationStats`` has it."""

    @property
    def model(self) -> str: ...
    @property
    def source(self) -> str: ...  # fingerprint of the model's weights
    @property
    def sha256(self) -> str: ...  # of the statistics
    @property
    def calibration(self) -> str: ...  # sha256 of the manifest they were made from
    @property
    def layers(self) -> Sequence[str]: ...
    @property
    def step_keys(self) -> Sequence[str]: ...  # by ascending sigma
    @property
    def sigmas(self) -> Array: ...
    def ranges(self, path: str) -> InputRanges: ...
    def shift(self, path: str) -> Array | None: ...  # [T,in], of what a GELU wrote


@dataclass(frozen=True)
class Options:
    """How to decide: ``rule`` "error" with its ``budget`` of relative output error, or "threshold" with ``thresholds`` (A4 below the
    first, A6 below the second); ``range`` a range method; ``alpha`` of SmoothQuant; whether to try ``migration`` after a GELU.
    """

    rule: str = "error"
    budget: float = 0.02
    thresholds: tuple[float, float] = (6.0, 10.0)
    range: str = "extremes"
    alpha: float = 0.5
    migration: bool = False

    def __post_init__(self) -> None:
        if not (np.isfinite(self.budget) and self.budget > 0):
            raise RecipeError(f"the error budget must be a positive number, found {self.budget}")
        if not 0 < self.thresholds[0] <= self.thresholds[1] < np.inf:
            raise RecipeError(f"thresholds must be two positive numbers, the smaller first, found {self.thresholds}; the default is 6,10")

    def tier_options(self, after_shift: bool) -> dict[str, float]:
        """Keyword arguments of the rule. A shifted input's thresholds are 5/6 and 8/10 of the others': 5 and 8 by default."""
        if self.rule == "error":
            return {"budget": self.budget}
        a4, a6 = self.thresholds
        return {"a4": a4 * 5 / 6, "a6": a6 * 8 / 10} if after_shift else {"a4": a4, "a6": a6}


@dataclass(frozen=True)
class Choice:
    """A layer's input at every tier, quantized by one range method, around ``shift`` [T,in] if there is one."""

    ranges: InputRanges
    weight: Array
    shift: Array | None
    tables: dict[int, ActivationTable]
    options: Options

    @classmethod
    def of(cls, ranges: InputRanges, weight: Array, shift: Array | None, options: Options) -> Choice:
        find = registry.get("range", options.range).function
        if shift is None:
            return cls(ranges, weight, None, {bits: find(ranges, weight, bits) for bits in TIERS}, options)
        return cls(ranges, weight, shift, {bits: centred(ranges, shift, weight, bits, find) for bits in TIERS}, options)

    def bits(self) -> Array:
        """By the tier rule, [T]: the error is of the output and needs x as it is; thresholds are for what is rounded, x - shift."""
        seen = self.ranges if self.shift is None or self.options.rule == "error" else shifted(self.ranges, self.shift)
        rule = registry.get("tier", self.options.rule).function
        chosen: Array = rule(seen, self.weight, self.tables, **self.options.tier_options(self.shift is not None))
        return chosen


@dataclass(frozen=True)
class Layer:
    """A layer that was decided on: the ranges of its input, its weight [out,in] float32, the table, the facts, and the shift [T,in]
    that was offered to it, which is None but after a GELU."""

    ranges: InputRanges
    weight: Array
    shift: Array | None
    table: ActivationTable
    facts: dict[str, Any]

    @classmethod
    def decided(cls, ranges: InputRanges, weight: Array, shift: Array | None, options: Options) -> Layer:
        """The shift is tried at the bits that the plain input gets; where it wins, the rule chooses again."""
        plain, measure = Choice.of(ranges, weight, None, options), OutputErrors(ranges, weight)
        table = mixed(plain.tables, plain.bits())
        facts: dict[str, Any] = {"error": rms(measure(table)), "shifted": False}
        if shift is not None:
            around = Choice.of(ranges, weight, shift, options)
            facts |= {"error_plain": facts["error"], "error_shifted": rms(measure(mixed(around.tables, table.bits)))}
            if facts["error_shifted"] < facts["error_plain"]:
                table = mixed(around.tables, around.bits())
                facts |= {"error": rms(measure(table)), "shifted": True}
        always = bool((table.bits == max(TIERS)).all())
        facts |= {"always_a8": always, "mean_bits": float(table.bits.mean()), "migration": False}
        return cls(ranges, weight, shift, table, facts)


def combined(ranges: InputRanges, weight: Array, table: ActivationTable) -> float:
    """Relative output error with the input on ``table`` and 4-bit weights rounded to nearest."""
    grid = fit_extremes(weight, WEIGHTS)
    return rms(combined_errors(ranges, weight, grid.dequantize(grid.quantize(weight)), table))


def try_division(
    layers: Mapping[str, Layer], divisor: Array, options: Options, facts: dict[str, Any], one_tier_less: bool = False
) -> Division:
    """Divide the input of layers that read one tensor, and apply that where it lowers their mean combined error at unchanged bits.

    The divided input then gets bits of its own: one tier fewer, or what the rule says of it.
    """
    choices, before, after = {}, [], []
    for path, layer in layers.items():
        shift = None if layer.shift is None else layer.shift / divisor
        choice = Choice.of(smoothquant.divided(layer.ranges, divisor), layer.weight * divisor, shift, options)
        before.append(combined(layer.ranges, layer.weight, layer.table))
        after.append(combined(choice.ranges, choice.weight, mixed(choice.tables, layer.table.bits)))
        choices[path] = choice
    applied = float(np.mean(after)) < float(np.mean(before))
    tables = {}
    for path, choice in choices.items() if applied else ():
        tables[path] = mixed(choice.tables, lowered(layers[path].table.bits) if one_tier_less else choice.bits())
    facts = {**facts, "error_before": float(np.mean(before)), "error_after": float(np.mean(after))}
    return Division(tuple(layers), divisor, applied, facts, tables)


def smoothed(layers: Mapping[str, Layer], options: Options) -> Division | None:
    """SmoothQuant on the tensor that these layers read; None where it is no candidate. By thresholds it is worth one tier."""
    peaks = np.max([smoothquant.peaks(layer.ranges) for layer in layers.values()], axis=0)
    if not smoothquant.candidate(peaks):
        return None
    facts = {"alpha": options.alpha, "ratio": smoothquant.spike(peaks)[0]}
    divisor = smoothquant.divisor(peaks, [layer.weight for layer in layers.values()], options.alpha)
    return try_division(layers, divisor, options, facts, one_tier_less=options.rule == "threshold")


def migrated(path: str, layer: Layer, options: Options) -> Division | None:
    """The integer migration of a shifted input; None where there is no shift, or no channel reaches further than the others."""
    if layer.shift is None:
        return None
    divisor = migration(layer.ranges, layer.shift)
    if divisor.max() == 1:
        return None
    return try_division({path: layer}, divisor, options, {"largest": int(divisor.max()), "channels": int((divisor > 1).sum())})


def read_together(layers: list[str], edges: tuple[Edge, ...]) -> Iterator[Edge]:
    """The edges whose consumers are all in ``layers``, and an edge without folds for each layer that is in none."""
    whole = [edge for edge in edges if set(edge.consumers) <= set(layers)]
    yield from whole
    yield from (Edge((path,)) for path in layers if not any(path in edge.consumers for edge in whole))


def decide(stats: Statistics, adapter: Adapter, options: Options, progress: Progress = silent) -> QuantConfig:
    """Decide on every layer of ``stats``; ``adapter`` has the model that they were collected from.

    Raises CalibrationError when the statistics are of other weights or layers, or of none.
    """
    if stats.source != (found := adapter.fingerprint):
        raise CalibrationError(
            f"the statistics were collected from weights {stats.source[:12]}…, this {adapter.name} has {found[:12]}…; "
            "collect them again from this model, or name theirs with --model"
        )
    linears, paths = adapter.linears(), list(stats.layers)
    if unknown := sorted(set(paths) - set(linears)):
        raise CalibrationError(f"the statistics are of {unknown[0]!r}, which this {adapter.name} does not have; collect them again")
    if not paths:
        raise CalibrationError("the statistics are of no layers; collect them again")
    tables, facts, smooth, migrations = {}, {}, {}, {}
    for edge in progress(list(read_together(paths, adapter.edges())), "layers"):
        layers = {}
        for path in edge.consumers:
            weight = np.array(linears[path].weight.astype(mx.float32))
            layers[path] = Layer.decided(stats.ranges(path), weight, stats.shift(path), options)
            tables[path], facts[path] = layers[path].table, layers[path].facts
        if edge.folds and (division := smoothed(layers, options)):
            smooth[edge.consumers[0]] = division
        for path, layer in layers.items() if options.migration else ():
            if division := migrated(path, layer, options):
                migrations[path] = division
                facts[path]["migration"] = division.applied
    return QuantConfig(
        facts={
            "model": stats.model,
            "source": stats.source,
            "parents": {"layer_statistics.json": stats.sha256},
            "calibration": stats.calibration,
            "options": asdict(options),
            "versions": versions(),
        },
        step_keys=tuple(stats.step_keys),
        sigmas=np.asarray(stats.sigmas, np.float32),
        plain={path: tables[path] for path in paths},
        layers={path: facts[path] for path in paths},
        smoothquant=smooth,
        migration=migrations,
    )
