"""What is at a path: one of our files or folders, or any checkpoint. Everything that has a checksum is verified on the
way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..api.structure import STRUCTURE as MODEL
from ..errors import ArtifactError
from ..files.archives import check_members
from ..files.checked import KEY, json_object, read_json, understood, verify_tensors
from ..files.explain import explain
from ..files.pickles import refuse_pickle
from ..files.schema import anything, inside, table_of
from ..pipeline.activation_stats import KIND as STATISTICS_KIND
from ..pipeline.activation_stats import STRUCTURE as STATISTICS
from ..pipeline.activation_stats import ActivationStats
from ..pipeline.ledger import Ledger, verify
from ..pipeline.quant_config import KIND as CONFIG_KIND
from ..pipeline.quant_config import QuantConfig
from ..pipeline.weight_files import KIND as WEIGHTS_KIND
from ..pipeline.weight_files import STRUCTURE as WEIGHTS
from ..report.page import LAYERS
from .arrays import AGAIN, StoredArray, list_arrays
from .layers import StoredLayer, foreign_layers, stored_layers, unnamed_layers

MODEL_KIND, REPORT_KIND = "quantized-model", "layer-report"
SPEAKERS = (
    "model.json", "report.json", "manifest.json", "metadata.json", "config.json", "layer_statistics.json",
    "quant_config.json",
)  # fmt: skip
SCHEMAS = {
    MODEL_KIND: MODEL,
    REPORT_KIND: LAYERS,
    STATISTICS_KIND: STATISTICS,
    WEIGHTS_KIND: WEIGHTS,
}  # of files that have no reader of their own here
HEADER = ("kind", "version", "sha256")
BULK = (
    "files",
    "plain",
    "layers",
    "attentions",
    "stages",
    "decisions",
    "blocks",
    "per_timestep",
    "smoothquant",
    "migration",
    "made_from",
    "complete",
    "pictures",
)


@dataclass(frozen=True)
class Contents:
    """``path`` is the file that speaks for the rest, ``kind`` ours, or "safetensors" or "npz"; ``facts`` are what it
    says of itself.

    ``checks`` has every file and how it was checked: by "sha256", "crc32", or, where nothing vouches for it, its
    "layout". ``statistics``, ``config`` and ``report``, an evaluation's objects on single layers, are there when the
    path is theirs.
    """

    path: Path
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    arrays: list[StoredArray] = field(default_factory=list)
    layers: list[StoredLayer] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    statistics: ActivationStats | None = None
    config: QuantConfig | None = None
    report: list[dict[str, Any]] | None = None


def read_contents(path: Path) -> Contents:
    """Raises ArtifactError, naming the file, when there is nothing that can be read, or something is damaged."""
    with understood(path, AGAIN):
        return _read(path)


def _read(path: Path) -> Contents:
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            refuse_pickle(path, "name a .safetensors, .npz or .json file, such as save-weights writes")
            raise ArtifactError(f"{path}: no such file or folder; check the path")
        if path.name.endswith(".safetensors.index.json"):
            return _read_checkpoint(path, _shards(path))
        if path.suffix == ".json":
            return _read_json(path)
        if path.suffix == ".npz":
            check_members(path, AGAIN)
            return Contents(path, "npz", arrays=list_arrays(path)[0], checks={path.name: "crc32"})
        if path.suffix == ".safetensors":
            return _read_checkpoint(path, [path])
    except OSError as error:
        raise explain(error, path) from error
    refuse_pickle(path, "name a .safetensors, .npz or .json file, such as save-weights writes")
    raise ArtifactError(f"{path}: expected a folder, or a .safetensors, .npz or .json file; name one of these")


def _read_folder(folder: Path) -> Contents:
    speakers = [name for name in SPEAKERS if _is_ours(folder / name)]
    tensors = sorted(folder.glob("*.safetensors"))
    below = sorted(path.parent for name in SPEAKERS for path in folder.glob(f"*/{name}") if _is_ours(path))
    if speakers:
        found = _read_json(folder / speakers[0])
        others = [*speakers[1:], *(f"{path.name}/" for path in dict.fromkeys(below))]
        return replace(found, notes=[*found.notes, f"also here: {', '.join(others)}"]) if others else found
    indices = sorted(folder.glob("*.safetensors.index.json"))
    shards = _shards(indices[0]) if len(indices) == 1 else tensors or sorted(folder.glob("*/*.safetensors"))
    if shards:
        return _read_checkpoint(folder, shards)
    if archives := sorted(folder.glob("*.npz")):
        contents = [read_contents(path) for path in archives]
        arrays = [replace(a, name=f"{part.path.stem}/{a.name}") for part in contents for a in part.arrays]
        return Contents(
            folder, "npz", arrays=arrays, checks={name: how for part in contents for name, how in part.checks.items()}
        )
    inside = (
        f"; it has {', '.join(f'{path.name}/' for path in dict.fromkeys(below))}, name one of them" if below else ""
    )
    raise ArtifactError(
        f"{folder}: holds nothing that mlxquant wrote, and no .safetensors or .npz files{inside or '; check the path'}"
    )


def _is_ours(path: Path) -> bool:
    """Whether a file is there and says that it is ours, or may have said so before it was damaged; config.json is
    others' name, too.
    """
    if not path.is_file():
        return False
    return path.name != "config.json" or "kind" in json_object(path, AGAIN)


def _read_json(path: Path) -> Contents:
    data = json_object(path, AGAIN)
    if not isinstance(data.get("kind"), str):
        raise ArtifactError(
            f"{path}: says no kind, so mlxquant did not write it; name a checkpoint or one of our files"
        )
    kind = data["kind"]
    data = read_json(path, kind, SCHEMAS.get(kind, anything))
    found = Contents(path, kind, _short(data), checks={path.name: "sha256"})
    with understood(path, "it is of another version, or damaged; run its step again"):
        if {"files", "complete", "made_from"} <= data.keys():
            return _read_ledger(found, data)
        if kind == MODEL_KIND:
            return _read_model(found, data)
        if kind == REPORT_KIND:
            return replace(found, report=data["layers"])
        if kind == CONFIG_KIND:
            config = QuantConfig.read(path)
            facts = {**found.facts.pop("made_from", {}), **found.facts}
            return replace(
                found, facts=facts, config=config, checks={**found.checks, data["sidecar"]["file"]: "sha256"}
            )
    return found


def _short(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of itself, without its header and without its bulk; what it was made from comes apart. What was
    kept at each stage is under ``stages``; in a layer report these are measurements, and it is under ``decisions``.
    """
    facts = {key: value for key, value in data.items() if key not in (*HEADER, *BULK)}
    if isinstance(made := data.get("made_from"), Mapping):
        facts = {**made, **facts}
    decided = data.get("decisions" if data.get("kind") == REPORT_KIND else "stages")
    kept = {stage["stage"]: stage["kept"] for stage in decided or []}
    kept |= (
        {name: block["kept"] for name, block in data["blocks"].items()}
        if isinstance(data.get("blocks"), Mapping)
        else {}
    )
    return {**facts, "kept": kept} if kept else facts


def _read_model(found: Contents, data: Mapping[str, Any]) -> Contents:
    arrays: list[StoredArray] = []
    for name, sha256 in data["files"].items():
        arrays += list_arrays(found.path.parent / name)[0]
        verify(found.path.parent / name, sha256)
    errors = {
        path: layer["error"]
        for stage in data["stages"]
        for path, layer in stage.get("layers", {}).items()
        if "error" in layer
    }
    layers = stored_layers(data["layers"], arrays, errors)
    return replace(
        found, arrays=arrays, layers=layers, checks={**found.checks, **dict.fromkeys(data["files"], "sha256")}
    )


def _read_ledger(found: Contents, data: Mapping[str, Any]) -> Contents:
    ledger = Ledger.read(found.path, found.kind)
    arrays: list[StoredArray] = []
    for name, sha256 in ledger.files.items():
        verify(ledger.folder / name, sha256)
        if name.endswith(".npz"):
            own = list_arrays(ledger.folder / name)[0]
            arrays += (
                own if "formats" in str(data.get("blocks")) else [replace(a, name=f"{name[:-4]}/{a.name}") for a in own]
            )
    blocks = data.get("blocks")
    formats = [block["formats"] for block in blocks.values()] if isinstance(blocks, Mapping) else []
    layers = stored_layers({path: format for some in formats for path, format in some.items()}, arrays)
    notes = (
        []
        if ledger.complete
        else [f"not finished: {len(ledger.files)} files so far; its step goes on when it is run again"]
    )
    statistics = ActivationStats(ledger) if found.kind == STATISTICS_KIND and ledger.complete else None
    checks = {**found.checks, **dict.fromkeys(ledger.files, "sha256")}
    return replace(found, arrays=arrays, layers=layers, notes=notes, statistics=statistics, checks=checks)


def _shards(index: Path) -> list[Path]:
    """The files of a checkpoint's index; raises ArtifactError when a tensor is not in the file that it names."""
    where = json_object(index, AGAIN).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ArtifactError(f"{index}: has no weight_map; download it anew")
    table_of(inside)(where, "weight_map")
    shards = [index.parent / name for name in sorted(set(where.values()))]
    held = {array.name: path.name for path in shards for array in list_arrays(path)[0]}
    if lost := [name for name, file in where.items() if held.get(name) != file]:
        raise ArtifactError(
            f"{index}: says that {lost[0]} is in {where[lost[0]]}, which does not hold it; download the checkpoint anew"
        )
    return shards


def _read_checkpoint(path: Path, shards: list[Path]) -> Contents:
    folder = path if path.is_dir() else path.parent
    found = Contents(path, "safetensors")
    headers = []
    for shard in shards:
        arrays, metadata = list_arrays(shard)
        found.arrays.extend(arrays)
        name = str(shard.relative_to(folder))
        if KEY in metadata:
            headers.append(header := verify_tensors(shard))
            layers = stored_layers(header.get("layers", {}), arrays, _errors(header))
            found.layers.extend(layers)
            found.checks[name] = "sha256"
        else:
            found.facts.update({key: value for key, value in metadata.items() if key not in found.facts})
            found.checks[name] = "layout"
    if len(shards) == len(headers) == 1:
        return replace(
            found, kind=str(headers[0]["kind"]), facts={**_short(headers[0]), **_short(headers[0].get("facts", {}))}
        )
    config = folder / "config.json"
    quantization = json_object(config, AGAIN).get("quantization") if config.is_file() and not headers else None
    if isinstance(quantization, dict):
        found.facts["quantization"] = {
            key: value for key, value in quantization.items() if not isinstance(value, dict | bool)
        }
        found.layers.extend(foreign_layers(quantization, found.arrays))
    if unknown := unnamed_layers(found.layers, found.arrays):
        found.notes.append(
            f"{unknown} layers look packed, and no config.json that MLX can read says with how many bits"
        )
    return found


def _errors(header: Mapping[str, Any]) -> dict[str, float]:
    layers = header.get("facts", {}).get("layers", {})
    return {path: layer["error"] for path, layer in layers.items() if "error" in layer}
