"""What bits buy in each layer: how much error of the prediction its weight causes in so many bits, and its input.

One pass over the full-precision model, a stage at a time: only the moments of one are in memory, and the states that
enter and leave it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..calibration.data import CalibrationData
from ..calibration.passes import Passes
from ..curvature.sensitivity import Sensitivity, measured, sensitivity_job
from ..files.kept_arrays import Measurements
from ..grids.weights import WeightFormat
from ..layers.kinds import known_kind
from ..layers.names import BIAS
from ..layers.tree import tapped
from ..methods import registry
from ..models.adapter import Adapter
from ..models.edges import written_by
from ..models.stages import Stage, State
from ..numerics.arrays import Array
from ..numerics.input_ranges import RANGE_BATCH
from ..numerics.moments import Moments
from ..numerics.part_moments import PartMoments
from ..progress import Progress, silent
from ..recipes.recipe import LayerSpec
from .collecting import Collector
from .inputs import LayerInput, errors_by_tier

MEASURED = 6  # bits up to which errors are measured: reckoned from those at 4, allocation loses 3 dB
Option = WeightFormat | None  # of a weight; None leaves it as it is


@dataclass(frozen=True)
class Survey:
    """What bits buy in one layer, in mean squared velocity error: ``weight`` [widths] at each width its weight may
    have, and ``input`` [tiers,T] at each number of bits its input may have and each noise level, None where that is not
    asked for.

    ``work`` counts the multiply-accumulates of all calibration data.
    """

    weight: Array
    input: Array | None
    work: float
    by_blocks: bool = False  # errors are of what blocks write, since there was no gradient

    @classmethod
    def of(cls, path: str, tables: Mapping[str, Array]) -> Survey:
        """A layer's, from what ``tables`` gave."""
        work, by_blocks = float(tables[f"{path}/work"][0]), f"{path}/by_blocks" in tables
        return cls(tables[f"{path}/weight"], tables.get(f"{path}/input"), work, by_blocks)

    def tables(self, path: str) -> dict[str, Array]:
        """Named as those of the layer at ``path``."""
        own = {"weight": self.weight, "work": np.array([self.work])}
        own |= {} if self.input is None else {"input": self.input}
        own |= {"by_blocks": np.ones(1)} if self.by_blocks else {}
        return {f"{path}/{name}": table for name, table in own.items()}


def survey(
    adapter: Adapter,
    calibration: CalibrationData,
    plan: Mapping[str, LayerSpec],
    formats: Mapping[str, Sequence[Option]],
    inputs: bool,
    progress: Progress = silent,
    work: Path | None = None,
    range_batch: int = RANGE_BATCH,
) -> dict[str, Survey]:
    """What bits buy in each planned layer, seen while the full-precision model runs over the calibration data.

    ``inputs`` asks for quantized inputs, too; ``range_batch`` is a recipe's. A stage at a time: only the moments of one
    are in memory, and the states that enter and leave it. Finished stages are kept in ``work``.
    """
    sigmas, batches = calibration.batches(adapter)
    states: Sequence[State] = batches
    job = sensitivity_job(calibration, plan)
    passes = Passes(adapter, sigmas, progress, calibration.sides)
    costs = measured(passes, adapter.stages, states, plan, Measurements(work, job))
    asked = {path: [spec.to_dict(), list(map(str, formats[path]))] for path, spec in plan.items()}
    kept = Measurements(
        None if work is None else work / "allocation",
        job | {"asked": asked, "inputs": inputs, "range_batch": range_batch},
    )
    layers, found, skipped = adapter.layers(), dict[str, Survey](), list[Stage]()
    after = written_by(adapter.edges())
    for stage in adapter.stages:
        paths, left = [path for path in plan if stage.owns(path)], list[State]()
        if (tables := kept.load(stage.name)) is not None:
            found |= {path: Survey.of(path, tables) for path in paths}
            skipped.append(stage)
            continue
        while skipped:
            states = passes.through(skipped.pop(0), states)
        ranges = inputs and any(plan[path].activation is not None for path in paths)
        collector = Collector(layers, ranges, costs.of_layer, sides=passes.sides, range_batch=range_batch)
        with tapped(adapter.module, paths, collector):
            for index in passes.indices(f"{stage.name}: inputs"):
                collector.sigma = sigmas[index]
                left.append(passes.one(stage, index, states[index]))
        states = left
        for path in progress(paths, f"{stage.name}: bits"):
            form, seen, spec = known_kind(layers[path]).form, collector[path], plan[path]
            weight = np.array(form.matrix_of(layers[path]).astype(mx.float32))
            moments = seen.moments.centred if spec.centred and BIAS in layers[path] else seen.moments
            on_weight, on_input = weight_errors(path, spec, formats[path], moments, weight, costs), None
            if inputs and spec.activation is not None:
                by_output = costs.of_outputs(path, seen.ranges.sigma)
                if by_output is not None and form.meets_one_part:
                    by_output = np.tile(by_output, (1, len(weight) // by_output.shape[1]))
                layer = LayerInput.of(spec.activation, seen.ranges, weight, by_output)
                on_input = errors_by_tier(layer, spec.activation, after.get(path, ()))
            found[path] = Survey(
                on_weight,
                on_input,
                float(moments.count * weight.size / (len(moments.parts) if form.meets_one_part else 1)),
                costs.by_blocks,
            )
        kept.save(stage.name, {name: table for path in paths for name, table in found[path].tables(path).items()})
    return {path: found[path] for path in plan}


def weight_errors(
    path: str, spec: LayerSpec, formats: Sequence[Option], moments: PartMoments, weight: Array, costs: Sensitivity
) -> Array:
    """The velocity error [formats] that a layer's weight causes in each format, rounded as its specification says.

    How much error a method leaves of rounding to nearest's differs between layers by two orders of magnitude, so no
    other will do. Above ``MEASURED`` bits each more quarters it, and nothing is rounded. ``moments`` weigh noise levels
    by what errors cost there, and each output counts by its cost averaged over them: as if the two were independent of
    each other. Methods that look at both streams find that they do not differ.
    """
    find, rounding = registry.get("steps", spec.steps).function, registry.get("round", spec.rounding).function
    by_output, errors = costs.layers[path].mean(0), list[float]()
    alike = [Moments(part.gram, part.count, part.gram) for part in moments.parts]
    slices = np.split(weight, len(alike))

    def lost(rows: Array, seen: Moments, form: WeightFormat) -> Array:
        """What rounding loses of a part of the weight."""
        if seen.count == 0:  # no token will tell
            return np.zeros_like(rows)
        grid = find(rows, form, seen)
        return rows - grid.dequantize(rounding(rows, grid, seen))

    levels = 0  # of the format before
    for form in formats:
        if form is None:
            errors.append(0.0)
            continue
        if levels and form.bits > MEASURED:
            errors.append(errors[-1] * (levels / form.levels) ** 2)
        else:
            wrong = [lost(rows, seen, form) for rows, seen in zip(slices, alike, strict=True)]
            errors.append(float(moments.errors(np.concatenate(wrong)) @ by_output) / moments.count)
        levels = form.levels
    return np.array(errors)
