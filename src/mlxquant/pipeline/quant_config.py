"""``quant_config.json``: how every layer's input is quantized at every timestep, and the numbers that this was decided
by.

Beside it lies ``quant_config.npz`` with what is a vector over channels: shifts and divisors. An entry's ``scale`` is
the step between two codes, never the largest value: ``x ~ scale * code + shift`` with signed codes of ``bits`` bits.

A division of channels (SmoothQuant, migration) multiplies columns of the weight, so its entries hold for weights that
were rounded after it and only for those. The config has the entries of the undivided input for every layer, and beside
them, where a division was found to pay, those of the divided input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import schema
from ..files.checked import read_json, understood, write_json
from ..grids.tables import BITS, ActivationTable
from ..numerics.arrays import Array
from .divisions import Division, LayerTables
from .ledger import read_npz, write_npz

KIND = "quant-config"
AGAIN = "run analyze-activations again"
STEPS = schema.table_of(  # by step and layer
    schema.table_of(
        schema.entries(
            {"bits": schema.one_of(*BITS), "scale": schema.number(0), "shift": schema.maybe(schema.number())},
            {"log": schema.flag},
        )
    ),
    1,
)
DIVISIONS = schema.table_of(
    schema.entries({"layers": schema.array_of(schema.text), "applied": schema.flag, "per_timestep": STEPS})
)
STRUCTURE = schema.entries(
    {
        "made_from": schema.entries(dict.fromkeys(("model", "source", "calibration"), schema.text)),
        "sigma_map": schema.table_of(schema.number(0), 1),
        "per_timestep": STEPS,
        "layers": schema.table_of(schema.entries({"shifted": schema.flag, "relative_error": schema.number(0)})),
        "smoothquant": DIVISIONS,
        "migration": DIVISIONS,
        "sidecar": schema.entries({"file": schema.inside, "sha256": schema.text}),
    }
)


@dataclass(frozen=True)
class QuantConfig:
    """``step_keys`` [T] name sampler steps by ascending ``sigmas`` [T] float32; ``plain`` has the table of every
    layer's input.

    ``facts`` say what it was made from, ``layers`` what was decided for each. ``smoothquant`` is by the first consumer
    of an edge, ``migration`` by layer; see ``Division``.
    """

    facts: dict[str, Any]
    step_keys: tuple[str, ...]
    sigmas: Array
    plain: LayerTables
    layers: dict[str, dict[str, Any]]
    smoothquant: dict[str, Division]
    migration: dict[str, Division]

    def tables(self, smoothed: bool = False, migrated: bool = False) -> LayerTables:
        """Each layer's table; with ``smoothed`` or ``migrated`` that of the divided input where the division was
        applied.
        """
        found = dict(self.plain)
        for wanted, divisions in ((smoothed, self.smoothquant), (migrated, self.migration)):
            for division in divisions.values() if wanted else ():
                found |= division.tables
        return found

    @property
    def divisors(self) -> dict[str, Array]:
        """What SmoothQuant divides by, [in], by the first consumer of each edge where it was applied."""
        return {path: division.divisor for path, division in self.smoothquant.items() if division.applied}

    @property
    def migrations(self) -> dict[str, Array]:
        """What a post-GELU layer divides by while it runs, [in], for each layer where migration was applied."""
        return {path: division.divisor for path, division in self.migration.items() if division.applied}

    @property
    def mean_bits(self) -> float:
        """Over all layers and timesteps, of the undivided inputs."""
        return float(np.mean([table.bits for table in self.plain.values()]))

    def write(self, path: Path) -> None:
        """Write the file and its sidecar, ``path`` with the suffix ``.npz``, each atomically; the one that names the
        other comes last.
        """
        vectors: dict[str, Array] = {}
        data = {
            "made_from": self.facts,
            "sigma_map": {key: float(sigma) for key, sigma in zip(self.step_keys, self.sigmas, strict=True)},
            "per_timestep": self._entries(self.plain, "shift", vectors),
            "layers": self.layers,
            "smoothquant": self._divisions(self.smoothquant, "smoothed_shift", vectors),
            "migration": self._divisions(self.migration, "migrated_shift", vectors),
        }
        sidecar = path.with_suffix(".npz")
        data["sidecar"] = {"file": sidecar.name, "sha256": write_npz(sidecar, vectors)}
        write_json(path, KIND, data)

    def _entries(self, tables: LayerTables, name: str, vectors: dict[str, Array]) -> dict[str, dict[str, Any]]:
        """Entries by step key and layer; shifts [T,in] go to ``vectors`` under ``{layer}__{name}`` and are null
        here.
        """
        wide = {path for path, table in tables.items() if table.shift.shape[1] > 1}
        vectors |= {f"{path}__{name}": tables[path].shift for path in wide}
        return {
            key: {
                path: {
                    "bits": int(table.bits[t]),
                    "scale": float(table.step[t]),
                    "shift": None if path in wide else float(table.shift[t, 0]),
                    **({"log": True} if table.log[t] else {}),
                }
                for path, table in tables.items()
            }
            for t, key in enumerate(self.step_keys)
        }

    def _divisions(self, divisions: Mapping[str, Division], name: str, vectors: dict[str, Array]) -> dict[str, Any]:
        vectors |= {f"{path}__divisor": division.divisor for path, division in divisions.items()}
        return {
            path: {
                **division.facts,
                "layers": list(division.layers),
                "applied": division.applied,
                "per_timestep": self._entries(division.tables, name, vectors),
            }
            for path, division in divisions.items()
        }

    @classmethod
    def read(cls, path: Path) -> QuantConfig:
        """What ``write`` wrote; raises ArtifactError when either file is missing, damaged or another's."""
        data = read_json(path, KIND, STRUCTURE, AGAIN)
        with understood(path, AGAIN):
            vectors = read_npz(path.parent / data["sidecar"]["file"], data["sidecar"]["sha256"])
            levels = sorted(data["sigma_map"].items(), key=lambda item: item[1])
            keys, sigmas = tuple(key for key, _ in levels), np.array([sigma for _, sigma in levels], np.float32)
            stored = _StoredTables(keys, sigmas, vectors)
            return cls(
                data["made_from"],
                keys,
                sigmas,
                stored.tables(data["per_timestep"], "shift"),
                data["layers"],
                {
                    first: stored.division(first, facts, "smoothed_shift")
                    for first, facts in data["smoothquant"].items()
                },
                {first: stored.division(first, facts, "migrated_shift") for first, facts in data["migration"].items()},
            )


@dataclass(frozen=True)
class _StoredTables:
    """Puts tables together again from the entries of a file and the ``vectors`` of its sidecar."""

    keys: tuple[str, ...]
    sigmas: Array
    vectors: dict[str, Array]

    def tables(self, entries: Mapping[str, Mapping[str, Any]], name: str) -> LayerTables:
        return {
            layer: self._table(layer, [entries[key][layer] for key in self.keys], name)
            for layer in entries[self.keys[0]]
        }

    def _table(self, layer: str, column: list[dict[str, Any]], name: str) -> ActivationTable:
        step, bits = np.array([e["scale"] for e in column], np.float32), np.array([e["bits"] for e in column], np.uint8)
        wide = column[0]["shift"] is None
        shift = self.vectors[f"{layer}__{name}"] if wide else np.array([[e["shift"]] for e in column], np.float32)
        return ActivationTable(self.sigmas, step, shift, bits, np.array([e.get("log", False) for e in column]))

    def division(self, first: str, facts: Mapping[str, Any], name: str) -> Division:
        rest = {key: value for key, value in facts.items() if key not in ("layers", "applied", "per_timestep")}
        tables = self.tables(facts["per_timestep"], name)
        divisor = self.vectors[f"{first}__divisor"]
        if divisor.ndim != 1 or not (divisor > 0).all() or not np.isfinite(divisor).all():
            raise schema.MismatchError(f"the divisor of {first} is not one positive number a channel")
        return Division(tuple(facts["layers"]), divisor, facts["applied"], rest, tables)
