"""Two-sided rounding at large: by which Hessian, and whether at all.

Gradients tell which inputs and outputs of a layer matter for what the model predicts, to first order. Rounding to three
or four bits makes errors for which that is not the whole truth: what had no gradient gets any error. On some models
the factor of inputs costs more than it gains, on others it gains most. So nothing is taken on trust. Each candidate is
rounded and run, on samples that no factor has seen, and the one whose predictions are nearest to those of the
full-precision model is what the recipe becomes; one-sided rounding is among them.

So it is with steps. A step that clips the largest weights is finer for all others, and on some models, behind a SiLU or
in text, that costs more than it gains; steps for what is really rounded (``regrid``) gain most on pictures, and cost
text. The best candidate is tried with steps that clip nothing, and with those, too; not where a recipe says how its
steps are refined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from ..calibration.data import CalibrationData
from ..calibration.passes import Passes
from ..calibration.probes import Probes, middles
from ..curvature.backward import Backward
from ..curvature.factors import Curvature, Factors, LayerCurvature, measure
from ..files import checked, schema
from ..files.kept_arrays import KeptFacts
from ..layers.tree import get_module, swapped
from ..models.adapter import Adapter
from ..models.stages import Stage
from ..numerics.arrays import Array
from ..numerics.moments import Moments
from ..numerics.part_moments import PartMoments
from ..numerics.transform import Transform
from ..progress import Progress, silent
from ..recipes.recipe import LayerSpec, TwoSided
from .layer import quantize_layer

SEARCHED, UNCLIPPED, REGRID = "search", "extremes", "regrid"  # methods that choose steps
ONE_SIDED = TwoSided("", 0)


@dataclass(frozen=True)
class Candidate:
    """A way to round: by which Hessian, and by other steps than those that a recipe searches: by ``UNCLIPPED`` ones, or
    those of ``REGRID``.
    """

    two_sided: TwoSided
    steps: str = SEARCHED

    def __str__(self) -> str:
        return str(self.two_sided) + {SEARCHED: "", UNCLIPPED: ", unclipped", REGRID: ", regrid"}[self.steps]

    def of(self, spec: LayerSpec) -> LayerSpec:
        """A layer's specification in this way."""
        own = replace(spec, two_sided=self.two_sided)
        if not steps_open(spec) or self.steps == SEARCHED:
            return own
        return replace(own, steps=UNCLIPPED) if self.steps == UNCLIPPED else replace(own, refine=REGRID)


def steps_open(spec: LayerSpec) -> bool:
    """Whether a specification leaves steps to what is measured."""
    return spec.steps == SEARCHED and spec.refine is None


STEPS = (SEARCHED, UNCLIPPED, REGRID)
CANDIDATES = tuple(map(Candidate, (ONE_SIDED, TwoSided("A", 0), TwoSided("A", 0.5), TwoSided("B", 0.5))))
AS_IT_IS = Transform()
TRIED = 50_000_000  # weights that candidates are tried on at most; in stages that are evenly spread
SHARE, FEWEST = 3, 3  # one stage in so many, but no fewer than so many
JUDGED = 64  # held-out rows
KIND = "two-sided"
TOLD = ("chosen", "errors", "layers", "rows")
FACTS = schema.entries(
    {
        "chosen": schema.text,
        "errors": schema.table_of(schema.number(0)),
        "layers": schema.whole(),
        "rows": schema.table_of(schema.whole()),
    },
    {"job": schema.text},
)


@dataclass(frozen=True)
class Chosen:
    """What a recipe means for each layer once it is known by which Hessian, and facts on that as plain data.
    ``curvature`` is None where rounding is one-sided.
    """

    plan: dict[str, LayerSpec]
    facts: dict[str, Any]
    curvature: Curvature | None


def aimed(
    moments: Moments,
    found: LayerCurvature | None,
    way: TwoSided | None,
    online: Transform = AS_IT_IS,
    folded: Sequence[tuple[slice, Transform]] = (),
) -> Moments:
    """What the rounding of a layer goes by: its inputs' moments, and where it is two-sided the factors of its Hessian.

    Args:
        moments: Of the inputs that it will get, transformed.
        found: What is known of it in the full-precision model.
        way: By which Hessian it is rounded.
        online: What the layer does to its inputs, which the factors have not seen.
        folded: What has been done to some of its rows.
    """
    factors = None if found is None or way is None else found.factors.get(way.sketch)
    if way is None or factors is None:
        return moments
    gram = moments.gram
    if way.share:
        weighed = online.moments(Moments(factors.inputs.astype(gram.dtype), moments.count)).gram
        gram = (1 - way.share) * _unit(gram) + way.share * _unit(weighed)
    both = Moments(gram, moments.count, moments.cross)
    both.outputs = _unit(outputs_of(factors, folded))
    return both


def outputs_of(factors: Factors, folded: Sequence[tuple[slice, Transform]]) -> Array:
    """H_O of a layer whose rows write something else than they did."""
    outputs = factors.outputs
    for rows, transform in folded:
        outputs = outputs.copy()
        outputs[:, rows] = transform.slopes(outputs[:, rows])
        outputs[rows] = transform.slopes(outputs[rows].T).T
    return outputs


def _unit(gram: Array) -> Array:
    """A matrix over its mean diagonal."""
    mean = np.diagonal(gram).mean(dtype=np.float64)
    return gram / gram.dtype.type(mean) if mean > 0 else gram


def choose(
    adapter: Adapter,
    calibration: CalibrationData,
    plan: Mapping[str, LayerSpec],
    progress: Progress = silent,
    candidates: Sequence[Candidate] = CANDIDATES,
    work: Path | None = None,
) -> Chosen:
    """For layers whose two-sided rounding is open, the candidate with the least error of what the model predicts for
    held-out samples.

    Layers are rounded for the full-precision model's inputs, weights alone, and are not refined as a recipe may say.
    Those of a third of the stages are, or of fewer in a large model, for errors of different layers add up.

    Args:
        adapter: The model, in full precision.
        calibration: What it is calibrated with.
        plan: What happens to each layer.
        progress: A bar around each part of it.
        candidates: What to choose from.
        work: A folder that keeps the choice.
    """
    opened = [path for path, spec in plan.items() if spec.open_ended]
    ways = {spec.two_sided for spec in plan.values()} - {None, ONE_SIDED}
    if not opened:
        return Chosen(dict(plan), {}, measure(adapter, calibration.probes(adapter), progress) if ways else None)
    every = {str(other): other for steps in STEPS for one in candidates for other in [replace(one, steps=steps)]}
    kept = None if work is None else KeptFacts(work / f"{KIND}.json", KIND, _job(calibration, plan, list(every)))
    found = None if kept is None else kept.load(FACTS)
    facts = None if found is None else {name: found[name] for name in TOLD}  # without what the file says of itself
    curvature = None
    if facts is None:
        try:
            curvature = measure(adapter, calibration.probes(adapter), progress)
        except (MemoryError, RuntimeError, ValueError) as error:  # MLX's own: no memory, or no gradient of something
            plain = _with(plan, opened, Candidate(ONE_SIDED))
            return Chosen(plain, {"chosen": str(ONE_SIDED), "without_gradient": str(error)}, None)
        facts = _compared(adapter, calibration, plan, opened, curvature, progress, candidates)
        if kept is not None:
            kept.save(facts)
    best = every[facts["chosen"]]
    chosen = _with(plan, opened, best)
    if best.two_sided == ONE_SIDED and not ways:
        return Chosen(chosen, facts, None)
    return Chosen(chosen, facts, curvature or measure(adapter, calibration.probes(adapter), progress))


def _with(plan: Mapping[str, LayerSpec], opened: Sequence[str], way: Candidate) -> dict[str, LayerSpec]:
    return {path: way.of(spec) if path in opened else spec for path, spec in plan.items()}


def _job(calibration: CalibrationData, plan: Mapping[str, LayerSpec], told: Sequence[str]) -> str:
    """All that a choice depends on."""
    layers = {path: spec.to_dict() for path, spec in plan.items()}
    return checked.digest([calibration.record, layers, told, checked.versions()])


def _compared(
    adapter: Adapter,
    calibration: CalibrationData,
    plan: Mapping[str, LayerSpec],
    opened: Sequence[str],
    curvature: Curvature,
    progress: Progress,
    candidates: Sequence[Candidate],
) -> dict[str, Any]:
    """Facts about what each candidate does to what the model predicts, and which is chosen."""
    tried = _tried(adapter, opened)
    held = calibration.probes(adapter, held_out=True).few(JUDGED)
    errors: dict[Candidate, float] = {}

    def judge(some: Sequence[Candidate]) -> Candidate:
        """Of these, and of those that were judged before, the best."""
        rounded = _rounded(adapter, plan, tried, curvature, progress, some)
        errors.update(zip(some, _errors(adapter, held, rounded, progress).tolist(), strict=True))
        return min(errors, key=lambda one: errors[one] if isfinite(errors[one]) else inf)

    best = judge(candidates)
    if any(steps_open(plan[path]) for path in opened):
        best = judge([replace(best, steps=steps) for steps in STEPS[1:]])
    return {
        "chosen": str(best),
        "errors": {str(one): error for one, error in errors.items() if isfinite(error)},
        "layers": sum(map(len, tried.values())),
        "rows": {"gradients": curvature.rows, "held_out": held.rows},
    }


def _rounded(
    adapter: Adapter,
    plan: Mapping[str, LayerSpec],
    tried: Mapping[Stage, Sequence[str]],
    curvature: Curvature,
    progress: Progress,
    candidates: Sequence[Candidate],
) -> list[dict[str, nn.Module]]:
    """For each candidate the layers that it is tried on, rounded for the full-precision model's inputs."""
    rounded: list[dict[str, nn.Module]] = [{} for _ in candidates]
    for stage, paths in tried.items():
        known = curvature.of_stage(adapter, stage, paths, progress=progress)
        for path in progress([path for path in paths if path in known], f"{stage.name}: candidates"):
            layer, seen = get_module(adapter.module, path), known[path]
            done: dict[LayerSpec, nn.Module] = {}
            for modules, way in zip(rounded, candidates, strict=True):
                own = way if way.two_sided.sketch in seen.factors else replace(way, two_sided=ONE_SIDED)
                spec = replace(own.of(plan[path]).start, corrected=False)
                spec = replace(spec, refine=None) if plan[path].refine else spec
                if spec not in done:
                    plain = PartMoments.one(Moments(seen.gram, seen.tokens, seen.gram))
                    aim = partial(aimed, found=seen, way=own.two_sided)
                    done[spec] = quantize_layer(layer, spec, plain, path, AS_IT_IS, aim).layer
                modules[path] = done[spec]
    return rounded


def _tried(adapter: Adapter, opened: Sequence[str]) -> dict[Stage, list[str]]:
    """The layers that candidates are tried on, by stage: those of stages that are evenly spread."""
    owned = [(stage, [path for path in opened if stage.owns(path)]) for stage in adapter.stages]
    owned = [(stage, paths) for stage, paths in owned if paths]
    sizes = [sum(get_module(adapter.module, path).weight.size for path in paths) for _, paths in owned]
    count = min(len(owned), max(FEWEST, len(owned) // SHARE))
    count = min(count, max(1, len(owned) * TRIED // sum(sizes)))
    return dict(owned[index] for index in middles(len(owned), count))


def _errors(adapter: Adapter, held: Probes, ways: Sequence[dict[str, nn.Module]], progress: Progress) -> Array:
    """How far the model with each of these sets of layers is from itself, on held-out samples: float64 [ways]."""
    chain, passes = Backward(adapter.stages), Passes(adapter, held.sigmas, progress, exact=True)
    weights = adapter.level_weights(held.sigmas)
    found = np.zeros(len(ways))
    for batch in passes.indices("held-out samples"):
        state, prompted = held.states[batch], held.prompted[batch]
        with passes.at(batch):
            exact = chain.predicted(state)
            for index, modules in enumerate(ways):
                with swapped(adapter.module, modules):
                    predicted = chain.predicted(state)
                    found[index] += weights[batch] * held.objective.errors(predicted, exact, prompted).sum()
    return found
