"""Put what the two tracks decided into a model: divisions before the weights are rounded, tables and learned layers
afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ArtifactError, CalibrationError, RecipeError
from ..files.checked import file_digest
from ..grids.time import Clock
from ..layers.tree import set_module
from ..models.adapter import Adapter
from ..models.edges import whole
from ..models.stages import Stage
from ..recipes.recipe import LayerSpec
from ..sweep.folding import divide
from ..sweep.layer import Preset
from ..sweep.store import Layers, StageCheckpoint, StageResult
from .quant_config import QuantConfig
from .samples import check_source
from .weight_files import CONFIG, WeightFiles


def prepare(adapter: Adapter, config: QuantConfig) -> dict[str, Preset]:
    """Apply the divisions that ``config`` decided on, before the weights are rounded: what every layer's input then
    looks like.

    SmoothQuant's go into the layers that write the tensors; a migration has nothing to go into and is left to the
    quantized layer. The model computes what it computed before. ``check`` first that the config is the adapter's.
    """
    by_consumer = {edge.consumers[0]: edge for edge in whole(adapter.edges())}
    for path, divisor in config.divisors.items():
        divide(adapter.module, by_consumer[path], divisor)
    tables = config.tables(smoothed=True, migrated=True)
    return {path: Preset(table, config.migrations.get(path)) for path, table in tables.items()}


def check(config: QuantConfig, model: str, source: str, calibration: str, where: Path) -> None:
    """Raise CalibrationError when a config was not decided for the ``model`` with the fingerprint ``source``, from the
    trajectories whose manifest has the sha256 ``calibration``: those that ``where``, a file of the weight track, was
    made from.
    """
    facts = config.facts
    if (facts["model"], facts["source"]) != (model, source):
        raise CalibrationError(
            f"{where} is of {model} with weights {source[:12]}…, the quantization config of {facts['model']} with"
            f" weights {facts['source'][:12]}…; collect and analyze the activations of this model"
        )
    if facts["calibration"] != calibration:
        raise CalibrationError(
            f"{where} and the quantization config come from different calibration data ({calibration[:12]}… and "
            f"{facts['calibration'][:12]}…); run both tracks on one --calib-dir"
        )


@dataclass(frozen=True)
class TrackFiles:
    """What the two tracks left on disk: ``weights`` the folder of adaround-optimize, ``config`` the file of
    analyze-activations.

    Without a config activations stay as they are (V1); with one its tables run (V2).
    """

    weights: Path
    config: Path | None = None

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of both, by their usual names."""
        found = {CONFIG: self.weights / CONFIG, "quant_config.json": self.config}
        return {name: file_digest(path) for name, path in found.items() if path is not None}

    def store(self, adapter: Adapter, plan: Mapping[str, LayerSpec] | None = None, active: bool = True) -> Tracks:
        """The store of both tracks for ``adapter``, to which the divisions that the weights were rounded with are
        applied first.

        ``active`` False takes the folds but leaves the activations unquantized. Raises CalibrationError or
        ArtifactError when weights, config and model were not made for each other, RecipeError when the weights are not
        in the formats that ``plan`` wants.
        """
        blocks = adapter.blocks
        weights = WeightFiles.read(self.weights, blocks, adapter.block_linears())
        facts, where = weights.ledger.facts, weights.ledger.path
        check_source(f"{where}: the learned weights", facts["model"], facts["source"], adapter)
        config = None if self.config is None else QuantConfig.read(self.config)
        digest = None if self.config is None else file_digest(self.config)
        rounded_with = facts["quant_config"]
        if rounded_with is not None and rounded_with != digest:
            raise ArtifactError(
                f"{where}: these weights were rounded with a quantization config of sha256 {rounded_with[:12]}…, "
                f"{'none was given' if digest is None else f'found {digest[:12]}…'}; pass that one with --quant-config"
            )
        if config is not None:
            check(config, facts["model"], facts["source"], facts["calibration"], where)
            if rounded_with is not None:
                prepare(adapter, config)
        for path, format in weights.formats().items():
            wanted = None if plan is None else plan[path].weight if path in plan else "it kept as it is"
            if wanted not in (None, format):
                raise RecipeError(
                    f"{where}: layer {path} is in format {format}, the recipe wants {wanted}; choose its recipe"
                )
        return Tracks(weights, config if active else None, divided=rounded_with is not None)


class Tracks:
    """Both tracks' outputs as the store of a sweep: blocks are there already, other stages are not.

    ``config`` gives the activation tables (V2); without it activations stay as they are (V1). Where the weights were
    rounded after a config's divisions, ``prepare`` must have run on the adapter with that config.
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
        # the report of the weight track says with what activations it learned, not what runs now
        report = {
            path: {**facts, "activation": layers[path].input_bits} for path, facts in result.facts["layers"].items()
        }
        return replace(result, layers=layers, facts={**result.facts, "layers": report})

    def save(self, stage: Stage, result: StageResult) -> None:
        """Nothing to keep: what is not in the tracks takes seconds."""

    def checkpoint(self, stage: Stage) -> StageCheckpoint | None:
        return None


def install(adapter: Adapter, store: Tracks, stages: tuple[Stage, ...]) -> list[StageResult]:
    """Put the tracks' layers in place; stages without any stay as they are."""
    results = [result for stage in stages if (result := store.load(stage, adapter.clock)) is not None]
    for result in results:
        for path, layer in result.layers.items():
            set_module(adapter.module, path, layer)
    return results
