"""Finished stages on disk, and the unfinished one: what lets a killed sweep go on where it was and end with the same
bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..files import schema
from ..files.atomic import ensure_writable
from ..files.kept_arrays import KeptArrays
from ..files.parameters import load_parameters
from ..grids.time import Clock
from ..layers.attention import QuantizedAttention
from ..layers.kinds import layer_facts, rebuilt, structure
from ..layers.own import QuantizedModule
from ..layers.product import QuantizedProduct
from ..layers.tree import parameters
from ..models.stages import Stage, State
from .folding import Gains

Layers = dict[str, QuantizedProduct]
Attentions = dict[str, QuantizedAttention]
Module = TypeVar("Module", bound=QuantizedModule)
INTERVAL = 20.0  # seconds between two checkpoints of a stage


@dataclass(frozen=True)
class StageResult:
    """What became of a stage: its quantized layers, facts for the report, and, fresh from quantizing, what the stage
    now writes.

    ``attentions`` are those whose probabilities are quantized, ``gains`` parameters of norms into which transforms of
    the layers' inputs were folded.
    """

    layers: Layers
    facts: dict[str, Any]
    outputs: list[State] | None = None
    attentions: Attentions = field(default_factory=dict)
    gains: Gains = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that takes the place of something in the stage."""
        return {**self.layers, **self.attentions}


class StageCheckpoint:
    """How far the optimiser of a stage is, in one file; ``job`` binds it to one model, recipe and calibration."""

    def __init__(self, path: Path, job: str):
        self._kept = KeptArrays(path, "checkpoint", job, "its stage then starts over")
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether enough time has gone by to save again."""
        return time.monotonic() - self._saved >= INTERVAL

    def load(self) -> tuple[dict[str, mx.array], dict[str, Any]] | None:
        """What was saved by the same job, or None. A damaged file raises ArtifactError."""
        found = self._kept.load(schema.entries({"facts": schema.table_of(schema.anything)}))
        return None if found is None else (found[0], found[1]["facts"])

    def save(self, arrays: dict[str, mx.array], facts: dict[str, Any]) -> None:
        self._kept.save(arrays, {"facts": facts})
        self._saved = time.monotonic()

    def clear(self) -> None:
        self._kept.clear()


class Store(Protocol):
    """Where a sweep keeps what it has finished."""

    def load(self, stage: Stage, clock: Clock) -> StageResult | None:
        """A finished stage of this job, or None. A damaged file raises ArtifactError."""
        ...

    def save(self, stage: Stage, result: StageResult) -> None:
        """Keep a finished stage; its checkpoint goes."""
        ...

    def checkpoint(self, stage: Stage) -> StageCheckpoint | None:
        """Where the stage in work keeps its optimiser, if anywhere."""
        ...


STAGES = schema.array_of(  # what a sweep says of its stages, in the facts of a quantized model
    schema.entries(
        {"stage": schema.text, "kept": schema.text},
        {"layers": schema.table_of(schema.entries({}, {"error": schema.maybe(schema.number())}))},
    )
)
HEADER = schema.entries(  # of a stage's file
    {
        "layers": schema.table_of(structure),
        "attentions": schema.table_of(QuantizedAttention.STRUCTURE),
        "facts": schema.table_of(schema.anything),
    },
    {"gains": schema.array_of(schema.text)},
)


class FolderStore:
    """One tensor file a stage in a folder. ``job`` binds them to one model, recipe and calibration."""

    def __init__(self, folder: Path, job: str):
        self.folder, self._job = folder, job
        ensure_writable(folder)

    def _kept(self, stage: Stage) -> KeptArrays:
        path = self.folder / f"{stage.name}.safetensors"
        return KeptArrays(path, "stage", self._job, "its stage is then quantized again")

    def load(self, stage: Stage, clock: Clock) -> StageResult | None:
        if (found := self._kept(stage).load(HEADER)) is None:
            return None
        arrays, header = found
        attentions = restore_modules(QuantizedAttention.blank, header["attentions"], arrays, clock)
        layers, gains = restore_layers(header["layers"], arrays, clock), header.get("gains", ())
        return StageResult(layers, header["facts"], None, attentions, {name: arrays[name] for name in gains})

    def save(self, stage: Stage, result: StageResult) -> None:
        structures: dict[str, Any] = {
            "layers": layer_facts(result.layers),
            "attentions": module_facts(result.attentions),
        }
        if result.gains:
            structures["gains"] = list(result.gains)
        self._kept(stage).save(layer_arrays(result.modules) | result.gains, {"facts": result.facts, **structures})
        self.checkpoint(stage).clear()

    def checkpoint(self, stage: Stage) -> StageCheckpoint:
        return StageCheckpoint(self.folder / f"{stage.name}.checkpoint.safetensors", self._job)


def module_facts(modules: Mapping[str, QuantizedModule]) -> dict[str, Any]:
    """The structure of quantized modules, by path."""
    return {path: module.facts for path, module in modules.items()}


def layer_arrays(layers: Mapping[str, nn.Module]) -> dict[str, mx.array]:
    """All tensors of some layers under their full paths."""
    return {f"{path}.{name}": value for path, layer in layers.items() for name, value in parameters(layer).items()}


def restore_layers(facts: dict[str, Any], arrays: dict[str, mx.array], clock: Clock) -> Layers:
    """The inverse of ``layer_arrays``, with the structure from each layer's ``facts``."""
    return restore_modules(rebuilt, facts, arrays, clock)


def restore_modules(
    blank: Callable[[Mapping[str, Any], Clock], Module],
    facts: dict[str, Any],
    arrays: dict[str, mx.array],
    clock: Clock,
) -> dict[str, Module]:
    """Modules that ``blank`` makes of their structure in ``facts``, by path, with their parameters from ``arrays``."""
    modules = {}
    for path, own_facts in facts.items():
        module = blank(own_facts, clock)
        own = {name.removeprefix(path + "."): value for name, value in arrays.items() if name.startswith(path + ".")}
        load_parameters(module, own, path)
        module.refresh()
        modules[path] = module
    return modules
