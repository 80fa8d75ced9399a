"""The sweep: where models and methods meet.

Two streams of hidden states go through the model side by side, one full-precision and one quantized. At each stage (embedders, a
block, the head) the quantized stream shows every layer the inputs that it will really get, the methods turn weights and statistics
into codes and activation tables, and the stage is compared, hard-rounded, with plain round-to-nearest; the better one stays. Nothing
is cached to disk but results: with a store, a killed sweep resumes at the stage it was in and ends with the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import artifacts
from .calibration import Calibration
from .errors import MlxQuantError, NumericsError
from .layers import QuantizedLinear
from .methods import registry
from .methods.moments import Moments, output_error
from .models.adapter import Adapter, Stage, State
from .progress import Progress, silent
from .recipe import LayerSpec, Recipe
from .rewrite import parameters, set_module, swapped, tapped
from .schedule import Clock
from .statistics import Collector

Layers = dict[str, QuantizedLinear]


@dataclass(frozen=True)
class StageResult:
    """What became of a stage: its quantized layers, facts for the report, and, fresh from quantizing, what the stage now writes."""

    layers: Layers
    facts: dict[str, Any]
    outputs: list[State] | None = None


def run_stage(adapter: Adapter, stage: Stage, sigmas: list[float], states: list[State], progress: Progress) -> list[State]:
    """One stage over all calibration batches."""
    outputs = []
    for sigma, state in progress(list(zip(sigmas, states, strict=True)), stage.name):
        with adapter.clock.at(sigma):
            outputs.append(stage.run(state))
            mx.eval(outputs[-1])
    return outputs


def stage_error(outputs: list[State], targets: list[State], inputs: list[State]) -> float:
    """Relative squared error of what a stage writes, over all calibration batches, averaged over its output tensors."""
    written = [key for key, value in outputs[0].items() if inputs[0].get(key) is not value]
    errors = []
    for key in written:
        pairs = [(o[key], t[key]) for o, t in zip(outputs, targets, strict=True)]
        difference = sum(energy(o - t) for o, t in pairs)
        total = sum(energy(t) for _, t in pairs)
        errors.append(difference / total if total > 0 else 0.0)
    return float(np.mean(errors))


def energy(x: mx.array) -> float:
    """Sum of squares."""
    return float(np.array(mx.square(x).sum()))


def quantize_layer(linear: nn.Linear, spec: LayerSpec, path: str, statistics: Collector, adapter: Adapter) -> tuple[QuantizedLinear, float]:
    """One layer by its specification: the quantized layer and its relative output error on the calibration inputs."""
    weight = np.array(linear.weight.astype(mx.float32)).astype(np.float64)
    moments: Moments = statistics[path].moments
    try:
        grid = registry.get("steps", spec.steps).function(weight, spec.weight, moments)
        codes = registry.get("round", spec.rounding).function(weight, grid, moments)
    except MlxQuantError as error:
        raise type(error)(f"layer {path}: {error}") from error
    rounded = grid.dequantize(codes)
    layer = QuantizedLinear(codes, grid, linear.bias if "bias" in linear else None)
    if spec.activation is not None:
        ranges = statistics[path].ranges
        ranges = ranges if spec.activation.per_timestep else ranges.merged()
        find = registry.get("range", spec.activation.range).function
        layer.set_activations(find(ranges, rounded, spec.activation.bits), adapter.clock)
    return layer, output_error(weight, rounded, moments)


class Store:
    """Finished stages on disk, so that a killed sweep goes on where it was. ``job`` binds them to one model, recipe and calibration."""

    def __init__(self, folder: Path, job: str):
        self.folder, self._job = folder, job
        artifacts.ensure_writable(folder)

    def _path(self, stage: Stage) -> Path:
        return self.folder / f"{stage.name}.safetensors"

    def load(self, stage: Stage, clock: Clock) -> StageResult | None:
        """A finished stage of this job, or None. A damaged file raises ArtifactError."""
        if not self._path(stage).exists():
            return None
        arrays, header = artifacts.read_tensors(self._path(stage), "stage")
        return StageResult(restore_layers(header["layers"], arrays, clock), header["facts"]) if header["job"] == self._job else None

    def save(self, stage: Stage, result: StageResult) -> None:
        header = {"job": self._job, "facts": result.facts, "layers": {path: layer.facts for path, layer in result.layers.items()}}
        artifacts.write_tensors(self._path(stage), "stage", layer_arrays(result.layers), header)


def layer_arrays(layers: Layers) -> dict[str, mx.array]:
    """All tensors of some layers under their full paths."""
    return {f"{path}.{name}": value for path, layer in layers.items() for name, value in parameters(layer).items()}


def restore_layers(facts: dict[str, Any], arrays: dict[str, mx.array], clock: Clock) -> Layers:
    """The inverse of ``layer_arrays``, with the structure from each layer's ``facts``."""
    layers = {}
    for path, structure in facts.items():
        layer = QuantizedLinear.blank(structure, clock)
        own = {name.removeprefix(path + "."): value for name, value in arrays.items() if name.startswith(path + ".")}
        artifacts.load_parameters(layer, own, path)
        layer.refresh()
        layers[path] = layer
    return layers


def quantize_stage(
    adapter: Adapter,
    stage: Stage,
    plan: dict[str, LayerSpec],
    gate: bool,
    sigmas: list[float],
    inputs: list[State],
    targets: list[State],
    progress: Progress,
) -> StageResult:
    """Quantize one stage on the quantized stream's inputs against the full-precision stream's outputs.

    The stage's layers in ``adapter.module`` are still full-precision and stay so; the result holds the quantized ones.
    """
    collector = Collector(ranges=any(spec.activation is not None for spec in plan.values()))
    with tapped(adapter.module, plan, collector):
        for sigma, state in progress(list(zip(sigmas, inputs, strict=True)), f"{stage.name}: statistics"):
            collector.sigma = sigma
            with adapter.clock.at(sigma):
                mx.eval(stage.run(state))
    linears = adapter.linears()

    def candidate(specs: dict[str, LayerSpec], name: str) -> StageResult:
        layers, report = {}, {}
        for path, spec in progress(specs.items(), f"{stage.name}: {name}"):
            layers[path], error = quantize_layer(linears[path], spec, path, collector, adapter)
            bits = 16 if spec.activation is None else spec.activation.bits
            report[path] = {"weight": str(spec.weight), "activation": bits, "error": error}
        with swapped(adapter.module, dict(layers)):
            outputs = run_stage(adapter, stage, sigmas, inputs, progress)
        error = stage_error(outputs, targets, inputs)
        if not np.isfinite(error):
            raise NumericsError(f"stage {stage.name}, quantized ({name}), writes NaN or infinite values; use more bits there or '=keep'")
        facts = {"stage": stage.name, "kept": name, "error": error, "layers": report}
        return StageResult(layers, facts, outputs)

    plain = {path: spec.plain for path, spec in plan.items()}
    result = candidate(plan, "rtn" if plain == plan else "calibrated")
    if not gate or plain == plan:
        return result
    rounded = candidate(plain, "rtn")
    errors = {"error": result.facts["error"], "error_rtn": rounded.facts["error"]}
    better = result if errors["error"] <= errors["error_rtn"] else rounded
    return replace(better, facts={**better.facts, **errors})


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
    exact, quantized = states, states
    facts = []
    for stage in adapter.stages:
        own = {path: spec for path, spec in plan.items() if stage.owns(path)}
        targets = run_stage(adapter, stage, sigmas, exact, progress)
        result = store.load(stage, adapter.clock) if store is not None else None
        if result is None:
            result = (
                quantize_stage(adapter, stage, own, recipe.gate, sigmas, quantized, targets, progress)
                if own
                else StageResult({}, {"stage": stage.name, "kept": "exact", "layers": {}})
            )
            if store is not None:
                store.save(stage, result)
        for path, layer in result.layers.items():
            set_module(adapter.module, path, layer)
        quantized = result.outputs or run_stage(adapter, stage, sigmas, quantized, progress)
        exact = targets
        facts.append(result.facts)
    return facts
