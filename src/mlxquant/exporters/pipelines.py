"""A whole pipeline as a folder that mflux runs.

mflux's own saver writes it: tokenizers, and what else a family wants beside its weights. The weights alone are written
here, since codes that were calibrated are to be what they are, with scales in bfloat16, in which mflux computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..files.atomic import atomic_folder
from ..models.mflux.components import SAVER, Component, in_place_of
from ..models.mflux.names import from_mflux
from ..models.mflux.pipeline import MfluxPipeline
from .mflux import write_mflux
from .plain import PlainModule, prepared
from .record import write_record

DTYPE = "bfloat16"
WRITER = "_save_weights"  # of mflux's saver, what writes one component


def write_pipeline(
    pipeline: MfluxPipeline,
    out: str | Path,
    origin: Mapping[str, Any] | None = None,
    force: bool = False,
    drop_activations: bool = False,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write a pipeline as a folder that ``mflux-generate… --model FOLDER`` runs: whole, or not at all.

    Args:
        pipeline: The pipeline, with quantized layers in place.
        out: The folder to write. mflux's commands know a model by its folder's name: let it begin with the model's.
        origin: What ``export.json`` says of how it came about, as plain data.
        force: Whether to replace a folder that mlxquant wrote.
        drop_activations: Whether to leave activation scales out, for which mflux has no place; else they are refused.
        dtype: Of every floating tensor; None for bfloat16 in quantized layers, and elsewhere what mflux loaded.

    Returns:
        ``out``, ``target``, ``bytes``, ``bits_per_weight``, by component how many ``layers`` are quantized, and
        ``notes`` for the user.

    Raises:
        ExportError: mflux has no place for what a layer does; it names the layer.
        ArtifactError: The folder exists and may not be replaced, or cannot be written.
    """
    plain = {one.folder: _plain(pipeline, one, drop_activations, dtype) for one in pipeline.components}
    level = _level(pipeline, plain)
    facts: dict[str, Any] = {
        "target": "mflux",
        "model": str(pipeline.name),
        "bits_per_weight": 8 * sum(one.nbytes for one in plain.values()) / sum(one.weights for one in plain.values()),
        "notes": {name: one.notes for name, one in plain.items() if one.notes},
    }
    layers = {name: one.layers for name, one in plain.items()}
    with atomic_folder(Path(out), force) as folder:
        with _writing(plain, level):
            pipeline.pipeline.save_model(str(folder))
        _record(pipeline, folder, level)
        facts["bytes"] = write_record(folder, {**facts, **(origin or {})}, layers)
    return {"out": str(out), **facts, "layers": {name: len(found) for name, found in layers.items()}}


def _plain(pipeline: MfluxPipeline, component: Component, drop_activations: bool, dtype: str | None) -> PlainModule:
    """A component's arrays as mflux reads them; ExportError names the component and the layer."""
    kept = pipeline.dtypes[component.name] if dtype is None else {}
    try:
        return prepared(component.module, "mflux", drop_activations, dtype or DTYPE, kept)
    except ExportError as error:
        raise ExportError(f"{component.name}: {error}") from error


@contextmanager
def _writing(plain: Mapping[str, PlainModule], level: int | None) -> Iterator[None]:
    """Inside, mflux's saver writes these in the folders of their components."""
    saver = from_mflux(SAVER)
    if WRITER not in saver.__dict__:
        raise ExportError("this mflux writes its folders in another way; use mflux 0.24")

    def write(base_path: str, bits: Any, model: Any, subdir: str, dtype: Any = None) -> None:
        write_mflux(Path(base_path), plain[subdir], subdir, level)

    with in_place_of(saver, WRITER, write):
        yield


def _level(pipeline: MfluxPipeline, plain: Mapping[str, PlainModule]) -> int | None:
    """The bits that every quantized component says it has: mflux refuses a Qwen-Image 2.1 whose components say two
    numbers. It reads those that a layer has from the shapes of its arrays, but for a text encoder of 8-bit floats, of
    which it believes this.
    """
    usual = [one.usual["bits"] for one in plain.values() if one.usual is not None]
    for component in pipeline.components:
        found = plain[component.folder].usual
        if component.name in pipeline.float8 and component.purpose == "text" and found is not None:
            return int(found["bits"])
    return min(usual, default=None)


def _record(pipeline: MfluxPipeline, folder: Path, level: int | None) -> None:
    """``mflux_model.json``, by which mflux and we know which model it is."""
    files = from_mflux("models.common.resolution.lora_resolution.LoraResolution").resolve_paths(
        [path for path, _ in pipeline.loras]
    )
    from_mflux("models.common.weights.saving.saved_model_info.SavedModelInfo").write(
        target=folder,
        key=pipeline.name.key,
        model_path=pipeline.name.place or None,
        model_config_repo_id=pipeline.pipeline.model_config.model_name,
        quantize=level,
        lora_sources=[path for path, _ in pipeline.loras],
        lora_files=files,
        lora_scales=[scale for _, scale in pipeline.loras],
    )
