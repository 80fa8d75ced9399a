"""The sweep: quantize a model stage by stage, and keep for each stage the trial that writes the least error. This is
where models and methods meet.

A layer has to be rounded for the inputs that it will really get, and those are what the quantized layers before it
write. So two streams of hidden states go through the model side by side: the exact one, which says what each stage
(embedders, a block, the head) should write, and the quantized one, which says what its layers read. For each stage

1. the exact stream goes first, and what it writes are the targets;
2. the layers are rounded for what the quantized stream brings, in several ways: as the recipe says, to nearest, and
   without each part that has to show that it helps (``rounding``);
3. transforms of the layers' inputs are tried one on top of the other, and each stays only if the error falls
   (``transform_choice``, ``folding``);
4. where the recipe asks for it, the codes of all layers are learned together (``reconstruction``);
5. the trial whose hard-rounded stage is nearest to the targets is put into the model, and the quantized stream goes on
   through it.

Step 1 comes before step 5 because both streams run through the same modules: once a stage holds quantized layers there
is no exact one any more. Nothing is kept that judges worse than what it was compared with. A stage that writes NaN is
an error that names it, except after a transform, which is then not kept; its report says so.

Nothing is cached to disk but results: with a store, a killed sweep resumes in the stage it was in and ends with the
same bytes. Three copies of the hidden states are held at most: what enters the quantized stage, what it writes, and
what the exact one writes. Where rounding looks at both streams, what enters the exact one is a fourth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from ..calibration.data import CalibrationData
from ..calibration.on_demand import OnDemand
from ..calibration.passes import Passes
from ..curvature.factors import Curvature
from ..curvature.sensitivity import measured, sensitivity_job
from ..errors import NumericsError, RecipeError
from ..files.kept_arrays import Measurements
from ..layers.tree import set_module, swapped
from ..models.adapter import Adapter
from ..models.stages import Stage, State
from ..progress import Progress, silent
from ..recipes.recipe import LayerSpec, Recipe
from .attention import quantize_probabilities
from .folding import gained, set_gains
from .memory import give_back
from .planning import planned
from .reconstruction import Reconstruction, reconstruct_stage
from .rounding import Rounding
from .store import Attentions, StageCheckpoint, StageResult, Store
from .streams import ChannelCosts, Deviation, ExactStream
from .trial import NEAREST, Job, Transforms, Trial

Replaced = Callable[[str, nn.Module, nn.Module], None]


def forget(path: str, before: nn.Module, after: nn.Module) -> None:
    """What a sweep does with a layer that another one has replaced."""


class Sweep:
    """Goes through the stages of a model and quantizes one after the other, as a job says."""

    def __init__(self, job: Job, replaced: Replaced = forget):
        self._job, self._replaced = job, replaced

    def run(
        self, stages: Sequence[Stage], states: list[State] | OnDemand, store: Store | None = None
    ) -> list[dict[str, Any]]:
        """Quantize the model in place. Stages after the last that has anything to quantize do not run.

        Args:
            stages: The end of the model's chain, or all of it.
            states: What enters the first of them, one state a batch. The list is cleared as soon as they have left that
                stage, so that nobody keeps them in memory.
            store: Where finished stages are, and go.

        Returns:
            One dictionary of facts a stage, plain data.
        """
        last = max(index for index, stage in enumerate(stages) if any(stage.owns(path) for path in self._job.plan))
        facts = []
        for stage in stages[: last + 1]:
            # Before anything of this stage is replaced, and also where the store has it: the exact stream must go on.
            targets, goes_on = self._job.teacher.targets(stage), stage is not stages[last]
            result = store.load(stage, self._job.adapter.clock) if store is not None else None
            if result is None:
                result = self.quantize(
                    stage, states, targets, None if store is None else store.checkpoint(stage), goes_on
                )
                if store is not None:
                    store.save(stage, result)
            for path, module in result.modules.items():  # from here on the stage is quantized, and stays so
                self._replaced(path, set_module(self._job.adapter.module, path, module), module)
            set_gains(self._job.adapter.module, result.gains)
            left = states
            if goes_on:
                states = result.outputs or self._job.passes.through(stage, states)
            left.clear()  # only now: the stage may just have run on them again
            give_back()
            facts.append(result.facts)
        return facts + [untouched(stage).facts for stage in stages[last + 1 :]]

    def quantize(
        self,
        stage: Stage,
        inputs: Sequence[State],
        targets: Sequence[State],
        checkpoint: StageCheckpoint | None = None,
        keep: bool = True,
    ) -> StageResult:
        """Quantize one stage. Its layers in the model are full-precision and stay so; the result holds the others.

        Args:
            stage: A stage of the chain.
            inputs: What the quantized stream brings to it, one state a batch.
            targets: What the exact stream writes, one state for each batch that is judged.
            checkpoint: Where learning keeps how far it is.
            keep: Whether somebody wants what the stage then writes. What is likely to be the best is tried last, so
                that its outputs can be kept while it is judged; the result has them only if it was the best.

        Returns:
            The best trial's layers and attentions, and facts about all trials.

        Raises:
            NumericsError: A trial writes NaN.
            RecipeError: Layers of the stage want to be learned in different ways.
        """
        specs = {path: spec for path, spec in self._job.plan.items() if stage.owns(path)}
        if not specs:
            return untouched(stage)
        bits, attentions = self._job.recipe.probabilities, Attentions()
        if bits is not None:  # first, and once: every trial has these attentions
            attentions = quantize_probabilities(self._job.passes, stage, inputs, bits)
        rounding = Rounding(self._job, stage, specs, inputs, attentions)
        specified, *others = rounding.first()
        for other in others:
            self._judge(stage, other, inputs, targets)
        ends_here = not specified.goals and not rounding.transforms  # then nothing is tried after it
        self._judge(stage, specified, inputs, targets, keep=keep and ends_here)
        start = best_of([trial for trial in (specified, *others) if trial.name != NEAREST] or [specified])
        rounding.adopt(start.name)  # transforms are tried on what is left of the specifications
        for trial in (specified, *others):
            if trial is not start:
                trial.goals = {}  # they hold moments and weights, and nobody learns from this trial
        report, transformed, learned = dict[str, Any](), list[Trial](), list[Trial]()
        if rounding.transforms:
            start, report["transforms"] = self._transform(stage, rounding, start, inputs, targets)
            transformed = [start]
        if start.goals:
            trial, report["learning"] = self._learn(stage, specs, start, inputs, targets, checkpoint)
            self._judge(stage, trial, inputs, targets, keep)
            learned = [trial]
        tried = [*transformed, *learned, specified, *others] if transformed else [specified, *learned, *others]
        best = best_of(tried)
        facts = {
            "stage": stage.name,
            "kept": best.name,
            "error": best.error,
            "layers": best.report,
            **report,
            "errors": {trial.name: trial.error for trial in tried},
        }
        if self._job.sensitivity is not None and self._job.sensitivity.by_blocks:
            facts["weighed"] = "block errors"  # there was no gradient
        return StageResult(best.layers, facts, best.outputs, best.attentions, best.gains)

    def _transform(
        self, stage: Stage, rounding: Rounding, start: Trial, inputs: Sequence[State], targets: Sequence[State]
    ) -> tuple[Trial, dict[str, Any]]:
        """Try one transform after the other on top of what has helped so far; the best trial, and facts about each.

        One that overflows, as a division may that is folded into float16 weights, has ``failed`` and is not kept. Of
        the trials only the best has goals, for those keep the moments and the weights of all layers in memory.
        """
        best, kept, facts = start, Transforms(), dict[str, Any]()
        for method in rounding.transforms:
            proposals = rounding.propose(method, kept)
            facts[method] = {"kept": False, "tensors": {name: proposal.facts for name, proposal in proposals.items()}}
            if not proposals:
                continue
            wanted = kept | {name: proposal.transform for name, proposal in proposals.items()}
            try:
                trial = rounding.transformed(f"{best.name}+{method}", wanted)
                self._judge(stage, trial, inputs, targets)
            except NumericsError as error:
                facts[method]["failed"] = str(error)
                continue
            facts[method] |= {"kept": trial.error < best.error, "error": trial.error}
            if trial.error < best.error:
                best, trial, kept = trial, best, wanted
            trial.goals = {}
        return best, facts

    def _learn(
        self,
        stage: Stage,
        specs: Mapping[str, LayerSpec],
        start: Trial,
        inputs: Sequence[State],
        targets: Sequence[State],
        checkpoint: StageCheckpoint | None,
    ) -> tuple[Trial, dict[str, Any]]:
        """The layers of ``start`` with learned codes for its goals; and facts about the run."""
        goals = start.goals
        ways = {(str(specs[path].reconstruct), specs[path].rounding == "rtn") for path in goals}
        if len(ways) > 1:
            raise RecipeError(
                f"stage {stage.name}: a stage is reconstructed by one method from one start, found {sorted(ways)}"
            )
        (method, nearest), settings = ways.pop(), self._job.recipe.learning
        work = Reconstruction(
            self._job.passes,
            stage,
            start.layers,
            goals,
            inputs,
            self._job.teacher,
            targets,
            settings,
            self._costs(stage, self._job.passes.sigmas),
        )
        label = f"{stage.name}: {method}"
        with gained(self._job.adapter.module, start.gains):
            codes, facts = reconstruct_stage(
                method, work, start.errors, nearest, checkpoint, settings, self._job.passes.progress, label
            )
        learned = Trial(
            "learned", dict(start.layers), dict(start.report), attentions=start.attentions, gains=start.gains
        )
        for path, values in codes.items():
            learned.add(path, specs[path], goals[path].with_codes(values))
        changed = sum(int((values != goals[path].codes).sum()) for path, values in codes.items())
        return learned, {**facts, "flipped": changed / sum(values.size for values in codes.values())}

    def _costs(self, stage: Stage, sigmas: Sequence[float]) -> ChannelCosts | None:
        return None if self._job.sensitivity is None else self._job.sensitivity.of_stage(stage.name, sigmas)

    def _judge(
        self, stage: Stage, trial: Trial, inputs: Sequence[State], targets: Sequence[State], keep: bool = False
    ) -> None:
        """Run the stage with a trial's layers, hard-rounded, and measure how far what it writes is from the targets;
        ``keep`` that.
        """
        judged = range(len(self._job.passes)) if self._job.judged is None else self._job.judged
        wanted, kept = dict(zip(judged, targets, strict=True)), list[State]()
        weights = self._job.adapter.weights(stage, targets[0]) if targets else {}
        deviation = Deviation(self._costs(stage, self._job.passes.some(judged).sigmas), weights)
        ran = range(len(self._job.passes)) if keep else judged
        module = self._job.adapter.module
        with swapped(module, trial.modules), gained(module, trial.gains):
            for index in self._job.passes.progress(ran, f"{stage.name}: {trial.name}"):
                outputs = self._job.passes.one(stage, index, inputs[index])
                if index in wanted:
                    deviation.add(self._job.teacher.pick(outputs), wanted[index])
                if keep:
                    kept.append(outputs)
        trial.error, trial.errors, trial.outputs = deviation.error, deviation.by_tensor, kept if keep else None
        if not np.isfinite(trial.error):
            raise NumericsError(
                f"stage {stage.name}, quantized ({trial.name}), writes NaN or infinite values; use more bits there or"
                " '=keep'"
            )


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the least error. Of equal errors the first wins: trials stand in the order in which they are
    preferred, what the recipe asks for before what leaves a part of it out or undoes it.
    """
    return min(trials, key=lambda trial: trial.error)


def untouched(stage: Stage) -> StageResult:
    """Of a stage in which nothing is quantized."""
    return StageResult({}, {"stage": stage.name, "kept": "exact", "layers": {}})


def sweep(
    adapter: Adapter,
    calibration: CalibrationData,
    recipe: Recipe,
    store: Store | None = None,
    progress: Progress = silent,
    work: Path | None = None,
    plan: Mapping[str, LayerSpec] | None = None,
    replaced: Replaced = forget,
    curvature: Curvature | None = None,
) -> list[dict[str, Any]]:
    """Quantize ``adapter.module`` in place, stage by stage.

    Args:
        adapter: The model, in full precision; quantized afterwards.
        calibration: What it sees meanwhile, made for this very model.
        recipe: What holds for all layers: how codes are learned, whether errors are weighed, bits of probabilities.
        store: Keeps finished stages, so that a killed sweep goes on.
        progress: A bar around each pass over the calibration data.
        work: A folder for what is measured before the first stage.
        plan: What the recipe means for each layer, by path; made from the recipe where nobody has made it.
        replaced: Told of each layer as it goes, by its path, with what stands there now; what nobody keeps then gives
            its memory back before the next stage begins.
        curvature: How errors inside the model add up, for layers whose rounding is two-sided.

    Returns:
        One dictionary of facts a stage, plain data.

    Raises:
        RecipeError: The recipe does not fit the model.
        NumericsError: The model, or what was tried, writes NaN.
    """
    plan = planned(adapter, recipe) if plan is None else plan
    sigmas, states = calibration.batches(adapter)
    passes = Passes(adapter, sigmas, progress, calibration.sides)
    both = any(spec.cross for spec in plan.values())
    every = both or any(spec.reconstruct is not None for spec in plan.values())
    judged = range(len(passes)) if every else calibration.judged(len(passes))
    teacher = ExactStream(passes.some(judged), states.some(judged), both)
    sensitivity = None
    if recipe.sensitivity:
        kept = Measurements(work, sensitivity_job(calibration, plan))
        sensitivity = measured(passes, adapter.stages, states, plan, kept)
    job = Job(passes, recipe, plan, teacher, sensitivity=sensitivity, curvature=curvature, judged=judged)
    return Sweep(job, replaced).run(adapter.stages, states, store)
