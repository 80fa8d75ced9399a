"""Round the layers of one stage in all the ways that are to be compared: the trials that a sweep judges.

A trial is a set of quantized layers for the stage. To make one, the stage runs over the calibration data while every
layer is watched, and methods turn what was seen into codes and tables. That run is what costs, so ways that see the
same inputs (as specified, to nearest, without branches, without shifts) share it, and a layer that two ways treat
alike is rounded once.

Where a layer's input is transformed, a tensor that several layers read gets one transform for all of them. What the
layers that write it can absorb is folded into them, in the model itself, while the stage is rounded; the rest the
quantized layers do while they run. The order matters and is the contract of ``_trials``:

- first the folding, so that what is seen is what the layers will be given;
- then, a group of layers at a time, statistics and rounding. All layers are one group, unless the recipe is
  sequential: then a group hangs on none but rounded ones, which stand in place while it is watched. Of several ways it
  is those of the first that stand there;
- statistics are dropped layer by layer: moments are the largest thing in memory;
- at the end the folding is undone, exactly. The full-precision stage is as it was.

It refuses nothing by itself: a layer that no batch reaches, and values that are not finite, are errors of the
collector and of the methods, which name the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..curvature.factors import LayerCurvature
from ..layers.kinds import known_kind
from ..layers.product import QuantizedProduct
from ..layers.tree import swapped, tapped
from ..methods import registry
from ..models.edges import Edge, Fold, written_by
from ..models.stages import Stage, State
from ..numerics.input_ranges import InputRanges
from ..numerics.transform import Parts, Transform
from ..recipes.recipe import ActivationSpec, LayerSpec
from .collecting import Collector, InputStatistics, Sharing
from .dependence import levels
from .folding import Gains, fold, foldable, gains_of, is_norm, producers, remaining
from .inputs import LayerInput, choose_table, shifts
from .layer import Preset, Rounded, quantize_layer
from .store import Attentions
from .transform_choice import Consumer, Proposal, propose
from .trial import CALIBRATED, NEAREST, Folded, Job, SharedInput, Specs, Transforms, Trial
from .two_sided import aimed


class Rounding:
    """Rounds the layers of one stage, as often as there is something to try. ``inputs`` enter the quantized stage, in
    which the probabilities of ``attentions`` are quantized.
    """

    def __init__(
        self, job: Job, stage: Stage, specs: Mapping[str, LayerSpec], inputs: Sequence[State], attentions: Attentions
    ):
        self._job, self._stage, self._specs = job, stage, dict(specs)
        self._inputs, self._attentions = inputs, attentions
        self._layers = {path: layer for path, layer in job.adapter.layers().items() if path in specs}
        self._after = written_by(job.adapter.edges())
        self._ranges: dict[str, InputRanges] = {}  # of untransformed inputs, kept by ``first`` for ``propose``

    @property
    def transforms(self) -> list[str]:
        """The transforms that any layer of the stage is to be tried with, in their order."""
        return list(dict.fromkeys(name for spec in self._specs.values() for name in spec.transforms))

    @cached_property
    def _leader(self) -> dict[str, str]:
        """By layer, in the order in which they run, the first layer that reads the same tensor. The first batch shows
        it, and more where that does not reach all layers, as a recorded call may.
        """
        sharing = Sharing(self._layers)
        for index in range(len(self._job.passes)):
            if self._specs.keys() <= sharing.leader.keys():
                break
            with self._job.passes.at(index), tapped(self._job.adapter.module, self._specs, sharing.leads):
                self._stage.run(self._inputs[index])  # never evaluated
        leader = {path: sharing[path] for path in self._specs}
        return {path: leader[path] for path in sharing.leader}

    @cached_property
    def _tensors(self) -> list[SharedInput]:
        return list(self._find_tensors())

    def _find_tensors(self) -> Iterator[SharedInput]:
        edges = [edge for edge in self._job.adapter.edges() if any(path in self._specs for path in edge.consumers)]
        for edge in edges:
            mine = tuple(path for path in edge.consumers if path in self._specs)
            complete = len(mine) == len(edge.consumers) and all(self._changes(where) for where in edge.producers)
            yield SharedInput(edge if complete else Edge(mine, after=edge.after, columns=edge.columns))
        known = {path for edge in edges for path in edge.consumers}
        parted = {path for edge in edges if edge.columns is not None for path in edge.consumers}
        for leader in dict.fromkeys(self._leader.values()):
            readers = [path for path, first in self._leader.items() if first == leader]
            if alone := tuple(path for path in readers if path not in known):
                yield SharedInput(Edge(alone))
            if parts := tuple(path for path in readers if path in parted):
                yield SharedInput(Edge(parts), of_parts=True)

    def _changes(self, where: Fold) -> bool:
        """Whether the quantized stage can have other weights there: those of its quantized layers and of its norms."""
        norm = self._stage.owns(where.path) and is_norm(self._job.adapter.module, where)
        return norm or where.path in self._specs

    @cached_property
    def _known(self) -> dict[str, LayerCurvature]:
        """The factors of the Hessian of each layer whose rounding is two-sided, before anything is folded into it."""
        ways = {path: spec.two_sided for path, spec in self._specs.items() if spec.two_sided is not None}
        paths = [path for path, way in ways.items() if way.sketch]
        if self._job.curvature is None or not paths:
            return {}
        sketches = sorted({ways[path].sketch for path in paths})
        adapter, progress = self._job.adapter, self._job.passes.progress
        return self._job.curvature.of_stage(adapter, self._stage, paths, sketches, progress)

    def _left_alone(self, path: str, spec: LayerSpec) -> bool:
        """Whether a layer's rounding is to be two-sided, and there is no Hessian: nothing hangs on its outputs, or they
        cannot be told apart.
        """
        way, known = spec.two_sided, self._known.get(path)
        return way is not None and bool(way.sketch) and (known is None or way.sketch not in known.factors)

    def first(self) -> list[Trial]:
        """The layers as their specifications have them before anything is transformed or learned; for the gate, rounded
        to nearest; and without each other part of them that has to show that it helps.
        """
        plain = {path: spec.plain for path, spec in self._specs.items()}
        ways: dict[str, Specs] = {CALIBRATED: self._specs}
        if all(spec.start == plain[path] for path, spec in self._specs.items()):
            ways = {NEAREST: self._specs}
        elif self._job.recipe.gate:
            # What is two-sided was chosen by what the model predicts; a stage's own error would not do it justice.
            ways |= self._without if self._known else {NEAREST: plain} | self._without
        return self._trials(ways, {}, keep_ranges=bool(self.transforms))

    @property
    def _without(self) -> dict[str, Specs]:
        """Specifications less something that layers have, by name: branches, and shifts of what a GELU wrote."""
        open_to = [path for path in self._specs if path not in self._job.presets]
        integers = {path: self._specs[path].without_branch() for path in open_to}
        centred = {path: self._specs[path].without_shift() for path in open_to if shifts(self._after.get(path, ()))}
        ways = {"without branch": self._specs | integers, "without shift": self._specs | centred}
        return {name: specs for name, specs in ways.items() if specs != self._specs}

    def adopt(self, name: str) -> None:
        """Go on from the trial of this name, one of those of ``first``: what it was without stays away."""
        self._specs = self._without.get(name, self._specs)

    def propose(self, method: str, current: Transforms) -> dict[str, Proposal]:
        """What a transform method would change, by tensor; its consumers must all be open to it. ``first`` must
        have run.
        """
        found = {}
        now = dict(current)
        for tensor in self._tensors:
            specs = {path: self._specs[path] for path in tensor.edge.consumers}
            open_to = all(method in spec.transforms and path not in self._job.presets for path, spec in specs.items())
            if open_to:
                others = {name: transform for name, transform in now.items() if name != tensor.name}
                given = [
                    Consumer(
                        self._input(path, spec.activation, self._ranges[path]),
                        spec,
                        tensor.edge.part,
                        self._parts(path, others),
                    )
                    for path, spec in specs.items()
                ]
                proposal = propose(method, given, tensor.place, now.get(tensor.name, Transform()), tensor.can)
                if proposal.after < proposal.before:
                    found[tensor.name] = proposal
                    now[tensor.name] = proposal.transform  # what parts cannot do is asked for on top of what they can
        return found

    def _parts(self, path: str, transforms: Transforms) -> Parts:
        """What becomes of the parts of what a layer reads, or of all of it."""
        mine = [tensor for tensor in self._tensors if path in tensor.edge.consumers and tensor.name in transforms]
        return Parts(tuple((tensor.edge.part, transforms[tensor.name]) for tensor in mine))

    def transformed(self, name: str, transforms: Transforms) -> Trial:
        """The layers as their specifications have them, their inputs transformed."""
        return self._trials({name: self._specs}, transforms)[0]

    def _trials(self, ways: Mapping[str, Specs], transforms: Transforms, keep_ranges: bool = False) -> list[Trial]:
        """One trial for each way, in their order, with these transforms; what comes before what is told above."""
        trials = [Trial(name, attentions=self._attentions) for name in ways]
        with self._applied(transforms) as (online, folded, gains):
            for trial in trials:
                trial.gains = gains
            for group in self._groups:
                statistics = self._statistics(group, online, trials[0].modules)
                if keep_ranges:
                    self._ranges |= {path: statistics[path].ranges for path in group}
                for path in self._job.passes.progress(group, f"{self._stage.name}: rounding"):
                    found: dict[LayerSpec, Rounded] = {}
                    seen = statistics.pop(path)  # the last reference, but for layers that share it and come later
                    for trial, specs in zip(trials, ways.values(), strict=True):
                        if (spec := specs[path]) not in found:
                            found[spec] = self._rounded(path, spec, seen, online[path], folded)
                        trial.add(path, spec, found[spec])
                        if self._left_alone(path, spec):
                            trial.report[path]["one_sided"] = True
        for trial in trials:  # in the order of the model, not of the rounding
            trial.layers = {path: trial.layers[path] for path in self._specs}
            trial.report = {path: trial.report[path] for path in self._specs}
        return trials

    @cached_property
    def _groups(self) -> list[list[str]]:
        """Layers that are rounded together: all of them, or in a sequential recipe those that hang on none but rounded
        ones (q, k and v of all streams, then their outputs).
        """
        if not self._job.recipe.sequential:
            return [list(self._specs)]
        job, row = self._job, self._job.adapter.take(self._inputs[0], slice(1))
        with job.passes.at(0):
            return levels(job.adapter.module, lambda: self._stage.run(row), self._leader)

    @contextmanager
    def _applied(self, transforms: Transforms) -> Iterator[tuple[dict[str, Transform], Folded, Gains]]:
        """With tensors transformed as far as what writes them can absorb that; by path, what the layers have to do
        themselves, whose rows have changed, and what norms have taken in.
        """
        presets, rows, gains, left = self._job.presets, Folded(), Gains(), Transforms()
        online = {path: Transform(presets[path].divisor) if path in presets else Transform() for path in self._specs}
        module = self._job.adapter.module
        with ExitStack() as undo:
            for tensor in self._tensors if transforms else ():
                if (transform := transforms.get(tensor.name)) is not None:
                    folded = foldable(tensor.edge, transform)
                    if not folded.nothing:
                        undo.callback(fold(module, tensor.edge, folded))
                        rows += [(where, folded) for where in producers(tensor.edge, folded)]
                        gains |= gains_of(module, tensor.edge)
                    left[tensor.name] = remaining(transform, folded)
            changed = [tensor for tensor in self._tensors if tensor.name in left] if left else []
            for path in [path for tensor in changed for path in tensor.edge.consumers]:
                layer = self._layers[path]
                online[path] = self._parts(path, left).online(known_kind(layer).shape(layer)[1])
            yield online, rows, gains

    def _statistics(
        self, paths: Sequence[str], online: Mapping[str, Transform], done: dict[str, nn.Module]
    ) -> dict[str, InputStatistics]:
        """What layers are given in the quantized stream, with those that are ``done`` in place, and where a
        specification asks for it in the exact one.
        """
        job, change = self._job, {path: online[path].inputs for path in paths if not online[path].nothing}
        ranges = any(self._specs[path].activation is not None for path in paths) or bool(self.transforms)
        weight = (lambda path, sigma: 1.0) if job.sensitivity is None else job.sensitivity.of_layer
        hold_out = any(self._specs[path].held_out for path in paths)
        collector = Collector(self._layers, ranges, weight, change, hold_out, job.passes.sides, job.recipe.range_batch)
        cross = any(self._specs[path].cross for path in paths)
        exact = job.teacher.inputs() if cross else self._inputs
        for index in job.passes.indices(f"{self._stage.name}: statistics"):
            collector.sigma, collector.exact = job.passes.sigmas[index], {}
            with job.passes.at(index):
                if cross:
                    with job.adapter.exactly(), tapped(job.adapter.module, paths, collector.see_exact):
                        mx.eval(self._stage.run(exact[index]))
                with swapped(job.adapter.module, done), tapped(job.adapter.module, paths, collector):
                    mx.eval(self._stage.run(self._inputs[index]))
        return {path: collector[path] for path in paths}

    def _input(
        self,
        path: str,
        spec: ActivationSpec | None,
        ranges: InputRanges,
        weight: Any = None,
        folded: Folded | None = None,
    ) -> LayerInput:
        """A layer's input at every noise level, or merged where one entry serves all, and what errors of its outputs
        cost, also where something was ``folded`` into its rows.
        """
        form = known_kind(self._layers[path]).form
        if weight is None:
            weight = np.array(form.matrix_of(self._layers[path]).astype(mx.float32))
        costs = None if self._job.sensitivity is None else self._job.sensitivity.of_outputs(path, ranges.sigma)
        for where, transform in folded or []:
            if costs is not None and where.path == path:
                before, rows, after = np.split(costs, [where.start, where.stop], axis=1)
                costs = np.concatenate([before, transform.costs(rows), after], axis=1)
        if costs is not None and form.meets_one_part:  # every expert's outputs are the layer's
            costs = np.tile(costs, (1, len(weight) // costs.shape[1]))
        return LayerInput.of(spec, ranges, weight.astype(np.float32), costs)

    def _rounded(
        self, path: str, spec: LayerSpec, statistics: InputStatistics, transform: Transform, folded: Folded
    ) -> Rounded:
        """A layer by a specification, with its activation table."""
        preset = self._job.presets.get(path, Preset())
        changed = [(slice(where.start, where.stop), change) for where, change in folded if where.path == path]
        aim = partial(aimed, found=self._known.get(path), way=spec.two_sided, online=transform, folded=changed)
        rounded = quantize_layer(self._layers[path], spec, statistics.moments, path, transform, aim)
        if spec.activation is not None and spec.activation.per_token:
            rounded.layer.quantize_tokens(spec.activation.bits)
        elif spec.activation is not None:
            table = preset.table
            if table is None:
                # Rotated channels are mixtures: what a GELU wrote cannot be told from them any more.
                after = self._after.get(path, ()) if transform.block == 1 else ()
                read = self._input(path, spec.activation, statistics.ranges, rounded.weight, folded)
                table = choose_table(read, spec.activation, after, lambda: np.array(rounded.layer.matrix()))
            rounded.layer.set_activations(table, self._job.adapter.clock)
        return rounded


def round_to_nearest(module: nn.Module, spec: LayerSpec) -> QuantizedProduct:
    """One layer in a specification's weight format, without calibration and with its inputs as they are."""
    form = known_kind(module).form
    weight = np.array(form.matrix_of(module).astype(mx.float32)).astype(np.float64)
    grid = registry.get("steps", "extremes").function(weight, spec.weight)
    layer: QuantizedProduct = form.of(module, registry.get("round", "rtn").function(weight, grid), grid)
    return layer
