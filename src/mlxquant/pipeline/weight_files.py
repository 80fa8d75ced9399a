"""Learned weights as the weight track leaves them: ``config.json`` and one ``weights/mmI.npz`` a block.

A block's file holds, for every Linear of the block under its full path: ``{path}__weight_int`` int8 [out,in], the codes
around zero; ``{path}__scale`` float32 [out] (of the format's digits, as ``grids.weights`` makes it); and, where the
block was reconstructed with quantized activations, ``{path}__a_scale`` float32 [T], the steps of its input, with
``__a_sigma`` [T], ``__a_shift`` [T, 1 or in] and ``__a_bits`` [T] and, if any entry is logarithmic, ``__a_log`` [T].
``{path}__divisor`` float32 [in] is there when the codes stand for ``W diag(divisor)``. The weight is ``scale *
weight_int / divisor``, exactly; nothing has to be rounded again. Groups of columns, asymmetric grids, rotations and
low-rank branches have no place in these files and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ArtifactError, MlxQuantError, reason
from ..files import checked, schema
from ..grids.tables import ActivationTable
from ..grids.time import Clock
from ..grids.weights import FORMAT, Grid, WeightFormat
from ..layers.linear import QuantizedLinear
from ..layers.product import QuantizedProduct
from ..models.stages import Stage
from ..numerics.arrays import Array
from ..sweep.store import StageCheckpoint, StageResult
from .ledger import Ledger

KIND = "adaround-weights"
CONFIG = "config.json"
COMMAND = "mlxquant adaround-optimize"
ANEW = f"run '{COMMAND}' again with --force --no-resume"
FACTS = schema.entries(
    {
        "model": schema.text,
        "source": schema.text,
        "calibration": schema.text,
        "quant_config": schema.maybe(schema.text),
    }
)
NOTES = schema.entries(
    {},
    {
        "blocks": schema.table_of(
            schema.entries(
                {"formats": schema.table_of(FORMAT), "layers": schema.table_of(schema.table_of(schema.anything))}
            )
        )
    },
)
STRUCTURE = schema.every(FACTS, NOTES)
TABLE, LOG = ("a_sigma", "a_scale", "a_shift", "a_bits"), "a_log"


def block_name(index: int) -> str:
    return f"mm{index}"


def _beyond(layer: QuantizedProduct) -> str | None:
    """What of a layer these files have no place for; None for nothing."""
    if not isinstance(layer, QuantizedLinear):
        return f"the form of a {type(layer).__name__}"
    if isinstance(layer.format.group, int) or not layer.format.symmetric:
        return f"the format {layer.format}"
    if layer.rotation > 1:
        return "a rotation"
    return "a low-rank branch" if layer.rank else None


class WeightFiles:
    """The folder as the store of a sweep over blocks: finished blocks are files, the one in work has a checkpoint
    beside them.

    ``linears`` are the model's own layers: they give the biases, which rounding leaves alone.
    """

    def __init__(self, ledger: Ledger, stages: Sequence[Stage], linears: Mapping[str, nn.Linear]):
        self.ledger = ledger
        self._index = {stage.name: index for index, stage in enumerate(stages)}
        self._linears = linears
        self._job = checked.digest(ledger.facts)

    @classmethod
    def read(cls, folder: Path, stages: Sequence[Stage], linears: Mapping[str, nn.Linear]) -> WeightFiles:
        """A finished folder; raises ArtifactError when it is missing, unfinished, damaged or of another number of
        blocks.
        """
        remedy = f"run '{COMMAND} --output-dir {folder}' first"
        files = cls(Ledger.read(folder / CONFIG, KIND, remedy, FACTS, NOTES).require_complete(COMMAND), stages, linears)
        wanted = {f"weights/{block_name(i)}.npz" for i in range(len(stages))}
        if set(files.ledger.files) != wanted:
            raise ArtifactError(
                f"{folder / CONFIG}: lists {sorted(files.ledger.files)}, this model has {len(stages)} blocks; {remedy}"
            )
        return files

    @staticmethod
    def facts(folder: Path) -> dict[str, Any]:
        """What a folder was made from, before its model is loaded; raises ArtifactError where there is none."""
        return Ledger.read(folder / CONFIG, KIND, f"run '{COMMAND} --output-dir {folder}' first", FACTS, NOTES).facts

    def holds(self, stage: Stage) -> bool:
        """Whether this stage is one of the blocks that the folder is for."""
        return stage.name in self._index

    def formats(self) -> dict[str, WeightFormat]:
        """The format of every layer in the finished blocks, by path."""
        blocks = self.ledger.notes.get("blocks", {}).values()
        return {path: WeightFormat(**format) for block in blocks for path, format in block["formats"].items()}

    def _file(self, stage: Stage) -> str:
        return f"weights/{block_name(self._index[stage.name])}.npz"

    def load(self, stage: Stage, clock: Clock) -> StageResult | None:
        if self._file(stage) not in self.ledger.files:
            return None
        facts = dict(self.ledger.notes["blocks"][block_name(self._index[stage.name])])
        formats = facts.pop("formats")
        arrays = self.ledger.arrays(self._file(stage))
        own = {path for path in self._linears if stage.owns(path)}
        named = {key.rsplit("__", 1)[0] for key in arrays}
        if named != set(formats) or not named <= own:
            strange = sorted((named ^ set(formats)) | (named - own))
            raise ArtifactError(f"{self._where(stage)}: its layers are not the model's, such as {strange[:3]}; {ANEW}")
        layers = dict[str, QuantizedProduct]()
        for path, format in formats.items():
            try:
                layers[path] = self._layer(path, WeightFormat(**format), arrays, clock)
            except KeyError as error:
                raise ArtifactError(f"{self._where(stage)}: layer {path}: {error} is missing; {ANEW}") from error
            except (MlxQuantError, ValueError, TypeError, IndexError) as error:
                raise ArtifactError(f"{self._where(stage)}: layer {path}: {reason(error)}; {ANEW}") from error
        return StageResult(layers, facts)

    def _where(self, stage: Stage) -> Path:
        return self.ledger.folder / self._file(stage)

    def _layer(self, path: str, format: WeightFormat, arrays: Mapping[str, Array], clock: Clock) -> QuantizedLinear:
        """A layer of ``format`` from its arrays; raises KeyError or an MlxQuantError when they are not what ``save``
        wrote.
        """
        linear = self._linears[path]
        own = {key.removeprefix(path + "__"): value for key, value in arrays.items() if key.startswith(path + "__")}
        if own["weight_int"].dtype != np.int8 or own["scale"].dtype != np.float32:
            raise ArtifactError(
                f"codes {own['weight_int'].dtype} and scales {own['scale'].dtype} are not int8 and float32"
            )
        codes, scale = own["weight_int"].astype(np.int16) + format.zero_code, own["scale"]
        if (
            codes.shape != linear.weight.shape
            or scale.shape != codes.shape[:1]
            or codes.min() < 0
            or codes.max() >= format.levels
        ):
            raise ArtifactError(
                f"codes {codes.shape} from {codes.min() - format.zero_code} to {codes.max() - format.zero_code} and"
                f" {scale.shape} scales found, {linear.weight.shape} codes of {format.bits} bits and"
                f" {linear.weight.shape[:1]} scales expected"
            )
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise ArtifactError("its scales are not positive")
        grid = Grid.symmetric(format, scale[:, None])
        if not np.array_equal(grid.scales[:, 0], scale):
            raise ArtifactError(
                f"its scales have more than the {format.digits} significant bits of its format, {format}, so the codes"
                " were not rounded on them"
            )
        divisor = mx.array(own["divisor"]) if "divisor" in own else None
        if divisor is not None and not (np.isfinite(own["divisor"]) & (own["divisor"] > 0)).all():
            raise ArtifactError("its divisor is not positive")
        bias = linear.bias if "bias" in linear else None
        layer = QuantizedLinear(codes.astype(np.uint8), grid, bias, divisor)
        if "a_scale" in own:
            sigma, step, shift, bits = (own[name] for name in TABLE)
            log = own.get(LOG, np.array(False))
            layer.set_activations(ActivationTable(sigma, step, shift, bits, log), clock)
        return layer

    def save(self, stage: Stage, result: StageResult) -> None:
        """Write a block's layers; raises ArtifactError, before anything is written, when the files cannot hold one of
        them.
        """
        arrays: dict[str, Array] = {}
        for path, layer in result.layers.items():
            if (strange := _beyond(layer)) is not None:
                raise ArtifactError(
                    f"{self._where(stage)}: layer {path} has {strange}, which these files cannot hold; expected"
                    " symmetric codes with one scale a row and nothing beside them; use 'mlxquant quantize' for this"
                    " recipe"
                )
            arrays[f"{path}__weight_int"] = (layer.codes().astype(np.int16) - layer.format.zero_code).astype(np.int8)
            arrays[f"{path}__scale"] = layer.grid().scales[:, 0]
            if isinstance(layer, QuantizedLinear) and layer.divisor is not None:
                arrays[f"{path}__divisor"] = np.array(layer.divisor)
            if (table := layer.table) is not None:
                values = (table.sigma, table.step, table.shift, table.bits)
                arrays |= {f"{path}__{name}": value for name, value in zip(TABLE, values, strict=True)}
                if table.log.any():
                    arrays[f"{path}__{LOG}"] = table.log
        self.ledger.add_npz(self._file(stage), arrays)
        formats = {path: layer.format.to_dict() for path, layer in result.layers.items()}
        blocks = self.ledger.notes.setdefault("blocks", {})
        blocks[block_name(self._index[stage.name])] = {**result.facts, "formats": formats}
        self.ledger.save()
        self.checkpoint(stage).clear()

    def finish(self) -> None:
        """Mark the folder as complete. A run that was killed between a block's file and its checkpoint's end left the
        checkpoint.
        """
        self.clear_checkpoints()
        self.ledger.save(complete=True)

    def clear_checkpoints(self) -> None:
        """Forget how far any block's optimiser is."""
        for index in self._index.values():
            self._checkpoint(index).clear()

    def checkpoint(self, stage: Stage) -> StageCheckpoint:
        return self._checkpoint(self._index[stage.name])

    def _checkpoint(self, index: int) -> StageCheckpoint:
        return StageCheckpoint(self.ledger.folder / f"{block_name(index)}.checkpoint.safetensors", self._job)
