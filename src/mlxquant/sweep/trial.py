"""Records of a sweep: the job, which is the same for all stages, and the trial, one way to quantize a stage, with its
error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import mlx.nn as nn

from ..calibration.passes import Passes
from ..curvature.factors import Curvature
from ..curvature.sensitivity import Sensitivity
from ..models.adapter import Adapter
from ..models.edges import Edge, Fold
from ..models.stages import State
from ..numerics.transform import Place, Transform
from ..recipes.recipe import LayerSpec, Recipe
from .folding import Gains, foldable, remaining
from .layer import Preset, Rounded
from .store import Attentions, Layers
from .streams import Teacher


@dataclass(frozen=True)
class Job:
    """What stays the same from stage to stage: the model and the batches that run through it, what happens to its
    layers, and the teacher, who has targets of the batches that are ``judged`` (None: all).
    """

    passes: Passes
    recipe: Recipe
    plan: Mapping[str, LayerSpec]
    teacher: Teacher
    presets: Mapping[str, Preset] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    curvature: Curvature | None = None
    judged: Sequence[int] | None = None

    @property
    def adapter(self) -> Adapter:
        return self.passes.adapter


@dataclass
class Trial:
    """Layers that a stage was tried with, what there is to report of each, and, once it was run with them, how far what
    it then wrote was from the targets: ``error``, as ``Deviation`` has it, and ``errors`` by tensor. ``goals`` are the
    layers whose codes may be learned; ``attentions`` have quantized probabilities; ``gains`` are parameters of norms
    that took in transforms of the layers' inputs.
    """

    name: str
    layers: Layers = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    goals: dict[str, Rounded] = field(default_factory=dict)
    attentions: Attentions = field(default_factory=dict)
    gains: Gains = field(default_factory=dict)
    error: float = inf
    errors: dict[str, float] = field(default_factory=dict)
    outputs: list[State] | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that takes the place of something in the stage."""
        return {**self.layers, **self.attentions}

    def add(self, path: str, spec: LayerSpec, rounded: Rounded) -> None:
        self.layers[path] = rounded.layer
        facts = {"weight": str(spec.weight), "activation": rounded.layer.input_bits, "error": rounded.error}
        self.report[path] = {**facts, **rounded.facts}
        if spec.reconstruct is not None:
            self.goals[path] = rounded


@dataclass(frozen=True)
class SharedInput:
    """What ``edge.consumers`` read, all of them layers that are quantized; ``edge`` has only producers that are
    quantized with them, and norms of their stage.

    Where ``edge`` has columns, it is a part of what they read. All that layers read of which there are parts is a
    tensor ``of_parts``, with an edge that says nothing more: what no part can do by itself, a rotation while the layers
    run, is for it to do after them.
    """

    edge: Edge
    of_parts: bool = False

    @property
    def name(self) -> str:
        return self.edge.name

    @property
    def place(self) -> Place:
        return Place(self.edge.after, self.edge.mixes if self.edge.folds else 1, bool(self.edge.reorders))

    def can(self, transform: Transform) -> bool:
        """Whether producers and quantized layers can do it together."""
        if self.of_parts:
            return transform.divisor is None and transform.order is None
        return self.edge.columns is None or remaining(transform, foldable(self.edge, transform)).block == 1


CALIBRATED, NEAREST = "calibrated", "rtn"  # trials
Specs = dict[str, LayerSpec]  # how a trial treats each layer
Transforms = dict[str, Transform]  # by name of the tensor
Folded = list[tuple[Fold, Transform]]  # rows that write something else than they did, and what
