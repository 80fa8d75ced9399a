"""The step that turns activation statistics into a quantization config: bits, shifts and divisions of every layer's
input.

``sweep.inputs`` decides on bits and shifts, a layer at a time, ``divisions`` on SmoothQuant and the integer migration;
this file knows which layers read the same tensor, and writes down everything that was compared, also where it was not
taken. It refuses statistics of another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import CalibrationError
from ..files.checked import plain, versions
from ..models.adapter import Adapter
from ..models.edges import Edge, whole
from ..numerics.arrays import Array
from ..numerics.input_ranges import InputRanges
from ..progress import Progress, silent
from ..sweep.inputs import LayerInput, Options, decide_input
from .divisions import migrated, smoothed
from .quant_config import QuantConfig


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
    def range_batch(self) -> int: ...  # pictures of a batch of averaged minima and maxima
    @property
    def layers(self) -> Sequence[str]: ...
    @property
    def step_keys(self) -> Sequence[str]: ...  # by ascending sigma
    @property
    def sigmas(self) -> Array: ...
    def ranges(self, path: str) -> InputRanges: ...
    def shift(self, path: str) -> Array | None: ...  # [T,in], of what a GELU wrote
    def sensitivity(
        self, path: str
    ) -> Array: ...  # [T,out], what a unit of squared error costs in squared velocity error


def read_together(layers: list[str], edges: tuple[Edge, ...]) -> Iterator[Edge]:
    """The edges whose consumers are all in ``layers``, and an edge without folds for each layer that is in none."""
    whole = [edge for edge in edges if set(edge.consumers) <= set(layers)]
    yield from whole
    yield from (Edge((path,)) for path in layers if not any(path in edge.consumers for edge in whole))


def made_from(stats: Statistics, options: Options) -> dict[str, Any]:
    """What determines the decisions, as plain data."""
    return plain(
        {
            "model": stats.model,
            "source": stats.source,
            "parents": {"layer_statistics.json": stats.sha256},
            "calibration": stats.calibration,
            "range_batch": stats.range_batch,
            "options": asdict(options),
            "versions": versions(),
        }
    )


def decide(stats: Statistics, adapter: Adapter, options: Options, progress: Progress = silent) -> QuantConfig:
    """Decide on every layer of ``stats``; ``adapter`` has the model that they were collected from.

    Raises CalibrationError when the statistics are of other weights or layers, or of none.
    """
    if stats.source != (found := adapter.fingerprint):
        raise CalibrationError(
            f"the statistics were collected from weights {stats.source[:12]}…, this {adapter.name} has {found[:12]}…; "
            "collect them again from this model, or name theirs with --model"
        )
    linears, paths = adapter.layers(), list(stats.layers)
    if unknown := sorted(set(paths) - set(linears)):
        raise CalibrationError(
            f"the statistics are of {unknown[0]!r}, which this {adapter.name} does not have; collect them again"
        )
    if not paths:
        raise CalibrationError("the statistics are of no layers; collect them again")
    tables, facts, smooth, migrations = {}, {}, {}, {}
    for edge in progress(list(read_together(paths, whole(adapter.edges()))), "layers"):
        layers = {}
        for path in edge.consumers:
            weight = np.array(linears[path].weight.astype(mx.float32))
            layer = LayerInput(stats.ranges(path), weight, stats.sensitivity(path))
            layers[path] = decide_input(layer, stats.shift(path), options)
            tables[path], facts[path] = layers[path].table, {**layers[path].facts, "migration": False}
        if edge.folds and (division := smoothed(layers, options)):
            smooth[edge.consumers[0]] = division
        for path, decided in layers.items() if options.migration else ():
            if division := migrated(path, decided, options):
                migrations[path] = division
                facts[path]["migration"] = division.applied
    return QuantConfig(
        facts=made_from(stats, options),
        step_keys=tuple(stats.step_keys),
        sigmas=np.asarray(stats.sigmas, np.float32),
        plain={path: tables[path] for path in paths},
        layers={path: facts[path] for path in paths},
        smoothquant=smooth,
        migration=migrations,
    )
