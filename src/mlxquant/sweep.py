"""The sweep: where models and methods meet.

Two streams of hidden states go through the model side by side, one full-precision and one quantized. At each stage (embedders, a
block, the head) the quantized stream shows every layer the inputs that it will really get, the methods turn weights and statistics
into codes and activation tables, a reconstruction may then learn the codes of the stage together, and what was tried is compared,
hard-rounded, with plain round-to-nearest; the best stays. Nothing is cached to disk but results: with a store, a killed sweep
resumes in the stage it was in and ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .activations import ActivationTable
from .calibration import Calibration
from .divisions import smoothed
from .errors import MlxQuantError, NumericsError, RecipeError
from .folds import divide
from .input_tables import LayerInput, Options, decide_input
from .layers import QuantizedLinear
from .methods import registry
from .methods.correction import corrected_target
from .methods.moments import Moments, output_error
from .methods.tiers import TIERS
from .models.adapter import Adapter, Stage, State
from .progress import Progress, silent
from .recipe import ActivationSpec, LayerSpec, Recipe
from .reconstruction import Reconstruction, reconstruct_stage
from .rewrite import set_module, swapped, tapped
from .sensitivity import Sensitivity, measure
from .statistics import Collector
from .store import Layers, StageCheckpoint, StageResult, Store
from .streams import ExactStream, Teacher, Weights, run_stage, stage_error

Array = npt.NDArray[Any]
SENSITIVITY_ROWS = 8


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


def quantize_layer(linear: nn.Linear, spec: LayerSpec, statistics: Collector, path: str, preset: Preset) -> Rounded:
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


def round_to_nearest(linear: nn.Linear, spec: LayerSpec) -> QuantizedLinear:
    """One layer in a specification's weight format, without calibration and with its inputs as they are."""
    weight = np.array(linear.weight.astype(mx.float32)).astype(np.float64)
    grid = registry.get("steps", "extremes").function(weight, spec.weight)
    return QuantizedLinear(registry.get("round", "rtn").function(weight, grid), grid, linear.bias if "bias" in linear else None)


def mean_bits(layer: QuantizedLinear) -> float:
    """With how many bits a layer's input is quantized, averaged over noise levels; 16 where it is not."""
    return 16.0 if layer.table is None else float(np.mean(layer.table.bits))


@dataclass(frozen=True)
class Sweep:
    """What stays the same from stage to stage: the model, what happens to its layers, the noise levels, and the teacher."""

    adapter: Adapter
    recipe: Recipe
    plan: Mapping[str, LayerSpec]
    sigmas: list[float]
    teacher: Teacher
    presets: Mapping[str, Preset] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    progress: Progress = silent

    def run(self, stages: Sequence[Stage], states: list[State], store: Store | None = None) -> list[dict[str, Any]]:
        """Quantize ``adapter.module`` in place; ``states`` enter the first of ``stages``. Returns one dictionary of facts a stage."""
        facts = []
        for stage in stages:
            targets = self.teacher.targets(stage)
            result = store.load(stage, self.adapter.clock) if store is not None else None
            if result is None:
                result = self.quantize(stage, states, targets, None if store is None else store.checkpoint(stage))
                if store is not None:
                    store.save(stage, result)
            for path, layer in result.layers.items():
                set_module(self.adapter.module, path, layer)
            states = result.outputs or run_stage(self.adapter, stage, self.sigmas, states, self.progress)
            facts.append(result.facts)
        return facts

    def quantize(self, stage: Stage, inputs: list[State], targets: list[State], checkpoint: StageCheckpoint | None = None) -> StageResult:
        """Quantize one stage on the quantized stream's ``inputs`` towards what the full-precision stream writes.

        The stage's layers in ``adapter.module`` are still full-precision and stay so; the result holds the quantized ones. Of what
        was tried (learned codes, what they started from, round to nearest) the hard-rounded stage with the least error is kept.
        """
        specs = {path: spec for path, spec in self.plan.items() if stage.owns(path)}
        if not specs:
            return StageResult({}, {"stage": stage.name, "kept": "exact", "layers": {}})
        statistics = self._statistics(stage, specs, inputs)
        divisions = self._smooth(stage, specs, statistics)
        if any(division["applied"] for division in divisions.values()):
            statistics = self._statistics(stage, specs, inputs)  # the layers read divided inputs now
        start, plain = ({path: getattr(spec, name) for path, spec in specs.items()} for name in ("start", "plain"))
        report: dict[str, Any] = {"smoothquant": divisions} if divisions else {}
        first = "rtn" if start == plain else "calibrated"
        rounded = self._round(stage, first, start, statistics)
        tried = [self._judge(stage, first, rounded, specs, inputs, targets)]
        if any(spec.reconstruct is not None for spec in specs.values()):
            learned, learning = self._learn(stage, specs, rounded, tried[0], inputs, targets, checkpoint)
            tried.append(self._judge(stage, "learned", learned, specs, inputs, targets))
            report["learning"] = learning
        if self.recipe.gate and first != "rtn":
            tried.append(self._judge(stage, "rtn", self._round(stage, "rtn", plain, statistics), specs, inputs, targets))
        best = min(tried, key=lambda result: result.facts["error"])
        errors = {result.facts["kept"]: result.facts["error"] for result in tried}
        return replace(best, facts={**best.facts, **report, "errors": errors})

    def _statistics(self, stage: Stage, specs: Mapping[str, LayerSpec], inputs: list[State]) -> Collector:
        """What the stage's layers are given in the quantized stream and, where a specification asks for it, in the exact one."""
        ranges = any(spec.activation is not None for spec in specs.values())
        collector = Collector(ranges) if self.sensitivity is None else Collector(ranges, self.sensitivity.of_layer)
        corrected = any(spec.corrected for spec in specs.values())
        exact = self.teacher.inputs() if corrected else inputs
        batches = list(zip(self.sigmas, inputs, exact, strict=True))
        for sigma, state, reference in self.progress(batches, f"{stage.name}: statistics"):
            collector.sigma, collector.exact = sigma, {}
            with self.adapter.clock.at(sigma):
                if corrected:
                    with tapped(self.adapter.module, specs, collector.exact.__setitem__):
                        mx.eval(stage.run(reference))
                with tapped(self.adapter.module, specs, collector):
                    mx.eval(stage.run(state))
        collector.exact = {}
        return collector

    def _smooth(self, stage: Stage, specs: Mapping[str, LayerSpec], statistics: Collector) -> dict[str, dict[str, Any]]:
        """Divide inputs with spiky channels where that pays, inside the full-precision stage, which goes on computing the same.

        Only where bits are chosen by error, and only where everything that is changed will be quantized and stored. Returns facts on
        every candidate by the first layer that reads it.
        """
        linears, facts = self.adapter.linears(), {}
        tiered = {path: a for path, spec in specs.items() if (a := spec.activation) is not None and a.budget is not None}
        open_ = tiered.keys() - {path for path, preset in self.presets.items() if preset.table is not None}
        for edge in self.adapter.edges():
            if not edge.folds or not {fold.path for fold in edge.folds} <= specs.keys() or not open_ >= set(edge.consumers):
                continue
            layers = {}
            for path in edge.consumers:
                weight = np.array(linears[path].weight.astype(mx.float32))
                layers[path] = decide_input(self._input(path, tiered[path], statistics, weight), None, tier_options(tiered[path]))
            if (division := smoothed(layers, tier_options(tiered[edge.consumers[0]]))) is not None:
                facts[edge.consumers[0]] = {**division.facts, "applied": division.applied}
                if division.applied:
                    divide(self.adapter.module, edge, division.divisor)
        return facts

    def _input(self, path: str, spec: ActivationSpec, statistics: Collector, weight: Array) -> LayerInput:
        """A layer's input at every noise level, or merged where one entry serves all, and what errors of its outputs cost."""
        ranges = statistics[path].ranges
        costs = None if self.sensitivity is None else self.sensitivity.of_outputs(path, ranges.sigma)
        if not spec.per_timestep:
            ranges, costs = ranges.merged(), None if costs is None else costs.mean(0, keepdims=True)
        return LayerInput(ranges, weight.astype(np.float32), costs)

    def _round(self, stage: Stage, name: str, specs: Mapping[str, LayerSpec], statistics: Collector) -> dict[str, Rounded]:
        linears, rounded = self.adapter.linears(), {}
        after = {path: edge.after for edge in self.adapter.edges() for path in edge.consumers}
        for path, spec in self.progress(specs.items(), f"{stage.name}: {name}"):
            preset = self.presets.get(path, Preset())
            rounded[path] = quantize_layer(linears[path], spec, statistics, path, preset)
            if spec.activation is not None:
                table = preset.table
                if table is None:
                    seen = self._input(path, spec.activation, statistics, rounded[path].weight)
                    table = activation_table(seen, spec.activation, rounded[path].layer, after.get(path, ""))
                rounded[path].layer.set_activations(table, self.adapter.clock)
        return rounded

    def _learn(
        self,
        stage: Stage,
        specs: Mapping[str, LayerSpec],
        rounded: Mapping[str, Rounded],
        start: StageResult,
        inputs: list[State],
        targets: list[State],
        checkpoint: StageCheckpoint | None,
    ) -> tuple[dict[str, Rounded], dict[str, Any]]:
        """The layers with learned codes where the plan says so, the others as they are; and facts about the run."""
        learning = {path: spec for path, spec in specs.items() if spec.reconstruct is not None}
        ways = {(str(spec.reconstruct), spec.rounding == "rtn") for spec in learning.values()}
        if len(ways) > 1:
            raise RecipeError(f"stage {stage.name}: a stage is reconstructed by one method from one start, found {sorted(ways)}")
        (method, nearest), settings = ways.pop(), self.recipe.learning
        goals = {path: rounded[path].target for path in learning}
        work = Reconstruction(
            self.adapter, stage, start.layers, goals, self.sigmas, inputs, self.teacher, targets, settings, self._weights(stage)
        )
        assert start.outputs is not None
        label = f"{stage.name}: {method}"
        codes, facts = reconstruct_stage(method, work, start.outputs, nearest, checkpoint, settings, self.progress, label)
        changed = sum(int((values != rounded[path].layer.codes()).sum()) for path, values in codes.items())
        learned = {path: replace(rounded[path], layer=rounded[path].layer.with_codes(values)) for path, values in codes.items()}
        return {**rounded, **learned}, {**facts, "flipped": changed / sum(values.size for values in codes.values())}

    def _weights(self, stage: Stage) -> Weights | None:
        return None if self.sensitivity is None else self.sensitivity.of_stage(stage.name, self.sigmas)

    def _judge(
        self,
        stage: Stage,
        name: str,
        rounded: Mapping[str, Rounded],
        specs: Mapping[str, LayerSpec],
        inputs: list[State],
        targets: list[State],
    ) -> StageResult:
        """The stage with these layers, hard-rounded: what it writes and how far that is from the targets."""
        layers: Layers = {path: r.layer for path, r in rounded.items()}
        with swapped(self.adapter.module, dict(layers)):
            outputs = run_stage(self.adapter, stage, self.sigmas, inputs, self.progress)
        error = stage_error([self.teacher.pick(o) for o in outputs], targets, self._weights(stage))
        if not np.isfinite(error):
            raise NumericsError(f"stage {stage.name}, quantized ({name}), writes NaN or infinite values; use more bits there or '=keep'")
        report = {}
        for path, r in rounded.items():
            report[path] = {"weight": str(specs[path].weight), "activation": mean_bits(r.layer), "error": r.error}
        return StageResult(layers, {"stage": stage.name, "kept": name, "error": error, "layers": report}, outputs)


def sweep(
    adapter: Adapter,
    calibration: Calibration,
    recipe: Recipe,
    store: Store | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Quantize ``adapter.module`` in place, stage by stage; returns one dictionary of facts a stage.

    Raises RecipeError when the recipe does not fit, NumericsError on NaN activations.
    """
    plan = recipe.plan({path: adapter.role(path) for path in adapter.linears()})
    sigmas, states = calibration.batches(adapter)
    teacher = ExactStream(adapter, sigmas, states, progress)
    sensitivity = measured(adapter, adapter.stages, sigmas, states, plan, progress) if recipe.sensitivity else None
    job = Sweep(adapter, recipe, plan, sigmas, teacher, sensitivity=sensitivity, progress=progress)
    return job.run(adapter.stages, states, store)


def measured(
    adapter: Adapter, stages: Sequence[Stage], sigmas: list[float], states: list[State], plan: Mapping[str, LayerSpec], progress: Progress
) -> Sensitivity:
    """Sensitivities of the stages and of the planned layers, on the first rows of every batch: an average over few suffices.

    In batches as the sampler has them these are guided rows, whose errors guidance multiplies by more than the others'.
    """
    few = [{key: value[:SENSITIVITY_ROWS] for key, value in state.items()} for state in states]
    return measure(adapter, stages, sigmas, few, plan, progress=progress)
