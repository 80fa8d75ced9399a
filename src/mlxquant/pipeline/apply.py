"""Put what the two tracks decided into a model: divisions before the weights are rounded, tables and learned layers afterwards."""

from __future__ import annotations

from dataclasses import replace

from ..errors import ArtifactError, CalibrationError
from ..folds import divide
from ..models.adapter import Adapter, Stage
from ..rewrite import set_module
from ..schedule import Clock
from ..store import Layers, StageCheckpoint, StageResult
from ..sweep import Preset
from .quant_config import QuantConfig
from .weight_files import WeightFiles


def prepare(adapter: Adapter, config: QuantConfig) -> dict[str, Preset]:
    """Apply the divisions that ``config`` decided on, before the weights are rounded: what every layer's input then looks like.

    SmoothQuant's go into the layers that write the tensors; a migration has nothing to go into and is left to the quantized layer.
    The model computes what it computed before. Raises CalibrationError when the config is of other weights.
    """
    check(config, adapter)
    by_consumer = {edge.consumers[0]: edge for edge in adapter.edges()}
    for path, divisor in config.divisors.items():
        divide(adapter.module, by_consumer[path], divisor)
    tables = config.tables(smoothed=True, migrated=True)
    return {path: Preset(table, config.migrations.get(path)) for path, table in tables.items()}


def check(config: QuantConfig, adapter: Adapter) -> None:
    """Raise CalibrationError when a config was decided for other weights than the adapter's."""
    facts = config.facts
    if (facts["model"], facts["source"]) != (adapter.name, adapter.fingerprint):
        raise CalibrationError(
            f"the quantization config is of {facts['model']} with weights {facts['source'][:12]}…, not of {adapter.name} with "
            f"{adapter.fingerprint[:12]}…; collect and analyze the activations of this model"
        )


class Tracks:
    """Both tracks' outputs as the store of a sweep: blocks are there already, other stages are not.

    ``config`` gives the activation tables (V2); without it activations stay as they are (V1). Where the weights were rounded after a
    config's divisions, ``prepare`` must have run on the adapter with that config.
    """

    def __init__(self, weights: WeightFiles, config: QuantConfig | None, divided: bool):
        self._weights, self._config, self._divided = weights, config, divided

    def load(self, stage: Stage, clock: Clock) -> StageResult | None:
        result = self._weights.load(stage, clock) if self._weights.holds(stage) else None
        if result is None:
            return None
        tables = {} if self._config is None else self._config.tables(smoothed=self._divided, migrated=self._divided)
        layers: Layers = {}
        for path, layer in result.layers.items():
            layer.drop_activations()
            if path in tables:
                layer.set_activations(tables[path], clock)
            layers[path] = layer
        return replace(result, layers=layers)

    def save(self, stage: Stage, result: StageResult) -> None:
        """Nothing to keep: what is not in the tracks takes seconds."""

    def checkpoint(self, stage: Stage) -> StageCheckpoint | None:
        return None


def tracks(adapter: Adapter, weights: WeightFiles, config: QuantConfig | None, config_digest: str | None, active: bool = True) -> Tracks:
    """The store of both tracks, after the divisions that the weights were rounded with were applied to ``adapter``.

    ``config_digest`` is the sha256 of the config's file. ``active`` False leaves the activations unquantized. Raises ArtifactError
    when weights and config were not made for each other.
    """
    facts, path = weights.ledger.facts, weights.ledger.path
    if facts["source"] != adapter.fingerprint:
        raise CalibrationError(f"{path}: these weights were learned from another {facts['model']}; optimize this model")
    rounded_with = facts["quant_config"]
    if rounded_with is not None and rounded_with != config_digest:
        raise ArtifactError(
            f"{path}: these weights were rounded with a quantization config of sha256 {rounded_with[:12]}…, "
            f"{'none was given' if config_digest is None else f'found {config_digest[:12]}…'}; pass that one with --quant-config"
        )
    if config is not None:
        check(config, adapter)
        if config.facts["calibration"] != facts["calibration"]:
            raise ArtifactError(
                f"{path}: weights and quantization config come from different calibration data "
                f"({facts['calibration'][:12]}… and {config.facts['calibration'][:12]}…); run both tracks on one --calib-dir"
            )
        if rounded_with is not None:
            prepare(adapter, config)
    return Tracks(weights, config if active else None, divided=rounded_with is not None)


def install(adapter: Adapter, store: Tracks, stages: tuple[Stage, ...]) -> list[StageResult]:
    """Put the tracks' layers in place; stages without any stay as they are."""
    results = [result for stage in stages if (result := store.load(stage, adapter.clock)) is not None]
    for result in results:
        for path, layer in result.layers.items():
            set_module(adapter.module, path, layer)
    return results
