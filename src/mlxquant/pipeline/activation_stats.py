"""What the inputs of a model's attention and MLP layers look like at every timestep of real trajectories.

A folder of ``timestep_stats/step_K.npz``, K the sampler's step, with per-channel arrays, and ``step_K_index.json`` with
a few numbers of each layer, under ``layer_statistics.json``. Layers that read the same tensor (q, k and v) have one
entry, their leader's; what an error of its outputs costs in the velocity is each layer's own. Modulation, embedders and
the output layer keep their inputs and have none.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactError
from ..files import schema
from ..files.archives import read_members
from ..files.checked import file_digest, read_json, understood
from ..files.schema import MismatchError
from ..numerics.arrays import Array
from ..numerics.input_ranges import InputRanges
from ..sweep.inputs import may_shift
from .ledger import Ledger
from .samples import MANIFEST

KIND, INDEX_KIND = "activation-statistics", "activation-summary"
STATISTICS = "layer_statistics.json"
COMMAND = "mlxquant collect-layer-activations"
AGAIN = f"run '{COMMAND} --force'"
INDEX = schema.entries({"layers": schema.table_of(schema.table_of(schema.number()))})


FACTS = schema.entries(
    {"model": schema.text, "source": schema.text, "parents": schema.entries({MANIFEST: schema.text})}
)
NOTES = schema.entries(
    {
        "sigma_map": schema.table_of(schema.number(0), 1),
        "paths": schema.array_of(schema.text, 1),
        "layers": schema.table_of(schema.entries({"leader": schema.text, "after": schema.text})),
    }
)
STRUCTURE = schema.every(FACTS, NOTES)


def array_name(step: str) -> str:
    return f"timestep_stats/step_{step}.npz"


def index_name(step: str) -> str:
    return f"timestep_stats/step_{step}_index.json"


class ActivationStats:
    """A folder of activation statistics, read layer by layer; each file's checksum is verified once, before its first
    use.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self._layers: dict[str, dict[str, Any]] = ledger.notes["layers"]
        self._sigma: dict[str, float] = ledger.notes["sigma_map"]
        self._verified: set[str] = set()
        self._latest: tuple[str, dict[str, Array]] | None = None  # q, k and v are asked for one after the other

    @classmethod
    def read(cls, path: Path) -> ActivationStats:
        """The folder of a ``layer_statistics.json``; raises ArtifactError when that is missing, unfinished, damaged or
        foreign.
        """
        return cls(Ledger.read(path, KIND, f"run '{COMMAND}' first", FACTS, NOTES).require_complete(COMMAND))

    @property
    def model(self) -> str:
        return str(self.ledger.facts["model"])

    @property
    def source(self) -> str:
        """Fingerprint of the model's weights."""
        return str(self.ledger.facts["source"])

    @property
    def sha256(self) -> str:
        return self.ledger.sha256

    @property
    def calibration(self) -> str:
        """sha256 of the manifest whose trajectories were replayed."""
        return str(self.ledger.facts["parents"][MANIFEST])

    @property
    def range_batch(self) -> int:
        """How many pictures each batch had over whose minima and maxima ``ranges`` are averaged. Folders of releases up
        to 0.2.0 do not say: they averaged over single samples, guided and unguided ones apart.
        """
        return int(self.ledger.facts.get("range_batch", 1))

    @property
    def layers(self) -> list[str]:
        """Every layer, in the model's order."""
        return list(self.ledger.notes["paths"])

    @property
    def leaders(self) -> list[str]:
        """The layers that have entries of their own."""
        return [path for path in self.layers if self.leader(path) == path]

    @property
    def step_keys(self) -> list[str]:
        """Sampler steps, as in the files' names, by ascending sigma."""
        return sorted(self._sigma, key=self._sigma.__getitem__)

    @property
    def sigmas(self) -> Array:
        """[T] float32, ascending."""
        return np.array([self._sigma[step] for step in self.step_keys], np.float32)

    def _layer(self, path: str) -> dict[str, Any]:
        if path not in self._layers:
            raise ArtifactError(
                f"{self.ledger.path}: has no layer {path!r}; it has {len(self._layers)}, such as {self.layers[0]!r}"
            )
        return self._layers[path]

    def leader(self, path: str) -> str:
        """The layer under whose name the statistics of this one are."""
        return str(self._layer(path)["leader"])

    def after(self, path: str) -> str:
        """The nonlinearity that wrote this layer's input, such as "gelu"; "" when there is none."""
        return str(self._layer(path)["after"])

    def ranges(self, path: str) -> InputRanges:
        """Of the layer's input, one row a timestep; ``rows`` are samples of it."""
        found = self._arrays(path)
        return InputRanges(self.sigmas, found["avg_min"], found["avg_max"], found["min"], found["max"], found["rows"])

    def shift(self, path: str) -> Array | None:
        """The moving centre [T,in] float32 of each channel of an input that a GELU wrote, None for others."""
        return self._arrays(path).get("shift")

    def sensitivity(self, path: str) -> Array:
        """What a unit of mean squared error of each of the layer's outputs costs in squared velocity error, [T,out]
        float32.
        """
        self._layer(path)
        return self._stacked([name := f"{path}__sensitivity"])[name]

    def histogram(self, path: str) -> tuple[Array, Array]:
        """Edges [bins + 1] and counts [T,bins] of the absolute values of the sampled rows; the last bin has everything
        above it, too.
        """
        found = self._arrays(path)
        return found["edges"], found["hist"]

    def summary(self, path: str) -> list[dict[str, float]]:
        """A few numbers of the layer at each timestep."""
        leader = self.leader(path)
        with understood(self.ledger.path, AGAIN):
            return [index["layers"][leader] for index in self._indices]

    @cached_property
    def _indices(self) -> list[dict[str, Any]]:
        return [read_json(self._file(index_name(step)), INDEX_KIND, INDEX) for step in self.step_keys]

    def _file(self, name: str) -> Path:
        path = self.ledger.folder / name
        if name not in self._verified:
            if (found := file_digest(path)) != (expected := self.ledger.files.get(name, "")):
                raise ArtifactError(
                    f"{path}: sha256 {found[:12]}… is not the {expected[:12]}… in {STATISTICS}; the file was changed or"
                    f" damaged, run '{COMMAND} --force'"
                )
            self._verified.add(name)
        return path

    def _arrays(self, path: str) -> dict[str, Array]:
        """A layer's arrays, its leader's, over timesteps [T,...]."""
        leader = self.leader(path)
        if self._latest is None or self._latest[0] != leader:
            self._latest = (leader, self._read(leader))
        return self._latest[1]

    def _read(self, leader: str) -> dict[str, Array]:
        names = [
            "avg_min",
            "avg_max",
            "min",
            "max",
            "hist",
            "rows",
            *(["shift"] if may_shift(self.after(leader)) else []),
        ]
        found = self._stacked(["hist_edges", *(f"{leader}__{name}" for name in names)])
        own = {name: found[f"{leader}__{name}"] for name in names}
        steps, width = own["rows"].shape[0], own["rows"].shape[-1]
        wide = [name for name in names if name not in ("rows", "hist")]
        if own["rows"].ndim != 3 or any(own[name].shape != (steps, width) for name in wide):
            raise ArtifactError(f"{self.ledger.path}: the arrays of {leader} are not of one width; {AGAIN}")
        if own["hist"].shape != (steps, found["hist_edges"].shape[-1] - 1):
            raise ArtifactError(f"{self.ledger.path}: the histograms of {leader} do not fit their edges; {AGAIN}")
        return {**own, "rows": own["rows"].astype(np.float32), "edges": found["hist_edges"][0]}

    def _stacked(self, names: list[str]) -> dict[str, Array]:
        """Arrays of the steps' files, over timesteps [T,...]."""
        parts: dict[str, list[Array]] = {name: [] for name in names}
        for step in self.step_keys:
            path = self._file(array_name(step))
            with understood(path, AGAIN):
                found = read_members(path, AGAIN, parts.__contains__)
                for name, values in parts.items():
                    if found[name].dtype.kind not in "fiu" or not np.isfinite(found[name]).all():
                        raise MismatchError(f"{name} holds what is no finite number")
                    values.append(found[name])
        with understood(self.ledger.path, AGAIN):
            return {name: np.stack(values) for name, values in parts.items()}
