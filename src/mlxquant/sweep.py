"""The sweep: where models and methods meet.

Two streams of hidden states go through the model side by side, one full-precision and one quantized. At each stage (embedders, a
block, the head) the quantized stream shows every layer the inputs that it will really get, the methods turn weights and statistics
into codes and activation tables, a reconstruction may then learn the codes of the stage together, and what was tried is compared,
hard-rounded, with plain round-to-nearest; the best stays. Nothing is cached to disk but results: with a store, a killed sweep
resumes in the stage it was in and ends with the same bytes.

Three copies of the hidden states are held at most: what enters the quantized stage, what it writes, and what the exact one writes. Where
rounding looks at both streams, what enters the exact one is a fourth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .calibration import Calibration
from .divisions import smoothed
from .errors import NumericsError, RecipeError
from .folds import divide
from .input_tables import LayerInput, decide_input
from .layer_rounding import Preset, Rounded, Statistics, activation_table, quantize_layer, tier_options
from .layers import QuantizedLinear
from .methods import registry
from .models.adapter import Adapter, Stage, State
from .progress import Progress, silent
from .recipe import ActivationSpec, LayerSpec, Recipe
from .reconstruction import Reconstruction, reconstruct_stage
from .rewrite import set_module, swapped, tapped
from .sensitivity import Sensitivity, measure
from .statistics import Collector, InputStatistics
from .store import Layers, StageCheckpoint, StageResult, Store
from .streams import Deviation, ExactStream, OnDemand, Teacher, Weights, run_batches, run_stage

Array = npt.NDArray[Any]
SENSITIVITY_ROWS = 8


def round_to_nearest(linear: nn.Linear, spec: LayerSpec) -> QuantizedLinear:
    """One layer in a specification's weight format, without calibration and with its inputs as they are."""
    weight = np.array(linear.weight.astype(mx.float32)).astype(np.float64)
    grid = registry.get("steps", "extremes").function(weight, spec.weight)
    return QuantizedLinear(registry.get("round", "rtn").function(weight, grid), grid, linear.bias if "bias" in linear else None)


def mean_bits(layer: QuantizedLinear) -> float:
    """With how many bits a layer's input is quantized, averaged over noise levels; 16 where it is not."""
    return 16.0 if layer.table is None else float(np.mean(layer.table.bits))


@dataclass
class Trial:
    """Layers that a stage was tried with, what there is to report of each, and, once it was run with them, how far what it then wrote
    was from the targets: ``error``, as ``Deviation`` has it, and ``errors`` by tensor.
    """

    name: str
    layers: Layers = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: float = inf
    errors: dict[str, float] = field(default_factory=dict)
    outputs: list[State] | None = None

    def add(self, path: str, spec: LayerSpec, rounded: Rounded) -> None:
        self.layers[path] = rounded.layer
        self.report[path] = {"weight": str(spec.weight), "activation": mean_bits(rounded.layer), "error": rounded.error}


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

    def run(self, stages: Sequence[Stage], states: list[State] | OnDemand, store: Store | None = None) -> list[dict[str, Any]]:
        """Quantize ``adapter.module`` in place; ``states`` enter the first of ``stages``. Returns one dictionary of facts a stage.

        ``states`` is cleared as soon as they have left that stage, so that nobody keeps them in memory.
        """
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
            left, states = states, result.outputs or run_stage(self.adapter, stage, self.sigmas, states, self.progress)
            left.clear()
            facts.append(result.facts)
        return facts

    def quantize(
        self, stage: Stage, inputs: Sequence[State], targets: Sequence[State], checkpoint: StageCheckpoint | None = None
    ) -> StageResult:
        """Quantize one stage on the quantized stream's ``inputs`` towards what the full-precision stream writes.

        The stage's layers in ``adapter.module`` are still full-precision and stay so; the result holds the quantized ones. Of what
        was tried (learned codes, what they started from, round to nearest) the hard-rounded stage with the least error is kept. What
        was likely to be the best is tried last, and the result has outputs only if it was.
        """
        specs = {path: spec for path, spec in self.plan.items() if stage.owns(path)}
        if not specs:
            return StageResult({}, {"stage": stage.name, "kept": "exact", "layers": {}})
        statistics = self._statistics(stage, specs, inputs)
        divisions = self._smooth(stage, specs, statistics)
        if any(division["applied"] for division in divisions.values()):
            statistics.clear()  # the layers read divided inputs now
            statistics = self._statistics(stage, specs, inputs)
        report: dict[str, Any] = {"smoothquant": divisions} if divisions else {}
        (start, *others), goals = self._round(stage, specs, statistics)
        for plain in others:
            self._judge(stage, plain, inputs, targets)
        self._judge(stage, start, inputs, targets, keep=not goals)
        tried = [start, *others]
        if goals:
            learned, learning = self._learn(stage, specs, goals, start, inputs, targets, checkpoint)
            self._judge(stage, learned, inputs, targets, keep=True)
            tried.insert(1, learned)
            report["learning"] = learning
        best = min(tried, key=lambda trial: trial.error)
        errors = {trial.name: trial.error for trial in tried}
        facts = {"stage": stage.name, "kept": best.name, "error": best.error, "layers": best.report, **report, "errors": errors}
        return StageResult(best.layers, facts, best.outputs)

    def _statistics(self, stage: Stage, specs: Mapping[str, LayerSpec], inputs: Sequence[State]) -> dict[str, InputStatistics]:
        """What the stage's layers are given in the quantized stream and, where a specification asks for it, in the exact one."""
        ranges = any(spec.activation is not None for spec in specs.values())
        collector = Collector(ranges) if self.sensitivity is None else Collector(ranges, self.sensitivity.of_layer)
        corrected = any(spec.corrected for spec in specs.values())
        exact = self.teacher.inputs() if corrected else inputs
        for index in self.progress(range(len(self.sigmas)), f"{stage.name}: statistics"):
            collector.sigma, collector.exact = self.sigmas[index], {}
            with self.adapter.clock.at(self.sigmas[index]):
                if corrected:
                    with tapped(self.adapter.module, specs, collector.exact.__setitem__):
                        mx.eval(stage.run(exact[index]))
                with tapped(self.adapter.module, specs, collector):
                    mx.eval(stage.run(inputs[index]))
        return {path: collector[path] for path in specs}

    def _smooth(self, stage: Stage, specs: Mapping[str, LayerSpec], statistics: Statistics) -> dict[str, dict[str, Any]]:
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

    def _input(self, path: str, spec: ActivationSpec, statistics: Statistics, weight: Array) -> LayerInput:
        """A layer's input at every noise level, or merged where one entry serves all, and what errors of its outputs cost."""
        ranges = statistics[path].ranges
        costs = None if self.sensitivity is None else self.sensitivity.of_outputs(path, ranges.sigma)
        if not spec.per_timestep:
            ranges, costs = ranges.merged(), None if costs is None else costs.mean(0, keepdims=True)
        return LayerInput(ranges, weight.astype(np.float32), costs)

    def _round(
        self, stage: Stage, specs: Mapping[str, LayerSpec], statistics: dict[str, InputStatistics]
    ) -> tuple[list[Trial], dict[str, Rounded]]:
        """The stage's layers as their specifications have them before anything is learned and, for the gate, rounded to nearest; and
        those of the first whose codes are to be learned. ``statistics`` is used up, layer by layer: it is most of what is in memory.
        """
        plain = all(spec.start == spec.plain for spec in specs.values())
        trials = [Trial(name) for name in (["rtn"] if plain else ["calibrated", "rtn"] if self.recipe.gate else ["calibrated"])]
        goals: dict[str, Rounded] = {}
        linears = self.adapter.linears()
        after = {path: edge.after for edge in self.adapter.edges() for path in edge.consumers}
        for path, spec in self.progress(specs.items(), f"{stage.name}: rounding"):
            goal = self._round_layer(trials, path, spec, linears[path], statistics.pop(path), after.get(path, ""))
            if goal is not None:
                goals[path] = goal
        return trials, goals

    def _round_layer(
        self, trials: list[Trial], path: str, spec: LayerSpec, linear: nn.Linear, statistics: InputStatistics, after: str
    ) -> Rounded | None:
        """Add a layer, with its activation table, to each of the trials; returns that of the first where its codes are to be learned.

        ``after`` is the nonlinearity that wrote its input.
        """
        preset, seen, made = self.presets.get(path, Preset()), {path: statistics}, list[Rounded]()
        for trial, way in zip(trials, (spec.start, spec.plain), strict=False):
            rounded = quantize_layer(linear, way, seen, path, preset)
            if way.activation is not None:
                table = preset.table
                if table is None:
                    read = self._input(path, way.activation, seen, rounded.weight)
                    table = activation_table(read, way.activation, rounded.layer, after)
                rounded.layer.set_activations(table, self.adapter.clock)
            trial.add(path, way, rounded)
            made.append(rounded)
        return made[0] if spec.reconstruct is not None else None

    def _learn(
        self,
        stage: Stage,
        specs: Mapping[str, LayerSpec],
        goals: Mapping[str, Rounded],
        start: Trial,
        inputs: Sequence[State],
        targets: Sequence[State],
        checkpoint: StageCheckpoint | None,
    ) -> tuple[Trial, dict[str, Any]]:
        """The layers of ``start`` with learned codes for those in ``goals``; and facts about the run."""
        ways = {(str(specs[path].reconstruct), specs[path].rounding == "rtn") for path in goals}
        if len(ways) > 1:
            raise RecipeError(f"stage {stage.name}: a stage is reconstructed by one method from one start, found {sorted(ways)}")
        (method, nearest), settings = ways.pop(), self.recipe.learning
        wanted = {path: rounded.target for path, rounded in goals.items()}
        work = Reconstruction(
            self.adapter, stage, start.layers, wanted, self.sigmas, inputs, self.teacher, targets, settings, self._weights(stage)
        )
        label = f"{stage.name}: {method}"
        codes, facts = reconstruct_stage(method, work, start.errors, nearest, checkpoint, settings, self.progress, label)
        learned = Trial("learned", dict(start.layers), dict(start.report))
        for path, values in codes.items():
            learned.add(path, specs[path], replace(goals[path], layer=goals[path].layer.with_codes(values)))
        changed = sum(int((values != goals[path].layer.codes()).sum()) for path, values in codes.items())
        return learned, {**facts, "flipped": changed / sum(values.size for values in codes.values())}

    def _weights(self, stage: Stage) -> Weights | None:
        return None if self.sensitivity is None else self.sensitivity.of_stage(stage.name, self.sigmas)

    def _judge(self, stage: Stage, trial: Trial, inputs: Sequence[State], targets: Sequence[State], keep: bool = False) -> None:
        """Run the stage with a trial's layers, hard-rounded, and measure how far what it writes is from the targets; ``keep`` that."""
        deviation, kept = Deviation(self._weights(stage)), list[State]()
        with swapped(self.adapter.module, dict(trial.layers)):
            batches = run_batches(self.adapter, stage, self.sigmas, inputs, self.progress, f"{stage.name}: {trial.name}")
            for (_, outputs), target in zip(batches, targets, strict=True):
                deviation.add(self.teacher.pick(outputs), target)
                if keep:
                    kept.append(outputs)
        trial.error, trial.errors, trial.outputs = deviation.error, deviation.by_tensor, kept if keep else None
        if not np.isfinite(trial.error):
            raise NumericsError(
                f"stage {stage.name}, quantized ({trial.name}), writes NaN or infinite values; use more bits there or '=keep'"
            )


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
    teacher = ExactStream(adapter, sigmas, states, progress, both=any(spec.corrected for spec in plan.values()))
    sensitivity = measured(adapter, adapter.stages, sigmas, states, plan, progress) if recipe.sensitivity else None
    job = Sweep(adapter, recipe, plan, sigmas, teacher, sensitivity=sensitivity, progress=progress)
    return job.run(adapter.stages, states, store)


def measured(
    adapter: Adapter,
    stages: Sequence[Stage],
    sigmas: list[float],
    states: Sequence[State],
    plan: Mapping[str, LayerSpec],
    progress: Progress,
) -> Sensitivity:
    """Sensitivities of the stages and of the planned layers, on a few rows of each noise level, which suffice for an average: the first
    of its batches, as many as one backward pass may have.

    In batches as the sampler has them these are guided rows, whose errors guidance multiplies by more than the others'.
    """
    count, seen, some = min(SENSITIVITY_ROWS, adapter.rows), Counter[float](), list[int]()
    for index, sigma in enumerate(sigmas):
        if seen[sigma] < SENSITIVITY_ROWS:
            seen[sigma] += min(count, next(iter(states[index].values())).shape[0])
            some.append(index)
    few = OnDemand(lambda index: {key: value[:count] for key, value in states[some[index]].items()}, range(len(some)))
    return measure(adapter, stages, [sigmas[index] for index in some], few, plan, progress=progress)
