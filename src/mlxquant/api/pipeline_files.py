"""A quantized pipeline of mflux as a folder of ours: for recipes whose layers do more than mflux has a place for, such
as integer inputs with a table for each noise level. What is not quantized in it stays where it was loaded from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import ArtifactError
from ..files.atomic import absolute_place, atomic_folder, relative_place
from ..files.checked import file_digest, read_json, versions, write_json
from ..files.schema import anything, array_of, entries, flag, inside, number, table_of, text
from ..layers.attention import find_quantized_attentions
from ..layers.module_files import load_module, save_module
from ..layers.tree import get_module
from ..models.mflux.families import host_of
from ..models.mflux.float8 import close_float8, open_float8
from ..models.mflux.names import PREFIX, is_mflux
from ..models.mflux.pipeline import MfluxPipeline
from .pipelines import PipelineReport

KIND, FILE = "quantized-pipeline", "pipeline.json"
STRUCTURE = entries(
    {
        "model": text,
        "place": text,
        "loras": array_of(entries({"path": text, "scale": number()})),
        "components": table_of(entries({"file": inside, "module": text, "opened": flag})),
        "files": table_of(text),
    },
    {"origin": anything},
)


def is_pipeline(reference: str) -> bool:
    """Whether ``load_pipeline`` reads a reference: mflux's models, by name or folder, and folders of ours."""
    return is_mflux(reference) or (Path(reference) / FILE).is_file()


def save_pipeline(
    pipeline: MfluxPipeline,
    report: PipelineReport,
    out: str | Path,
    origin: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write the quantized modules of a pipeline as a folder that ``load_pipeline`` reads: whole, or not at all.

    Args:
        pipeline: The pipeline, with quantized layers in place.
        report: What ``quantize_pipeline`` said of it.
        out: The folder to write.
        origin: How it came about, as plain data.
        force: Whether to replace a folder that mlxquant wrote.

    Returns:
        The folder.

    Raises:
        ArtifactError: The folder exists and may not be replaced, or cannot be written.
    """
    modules = {component.name: component.module for component in pipeline.components}
    with atomic_folder(Path(out), force) as folder:
        written = {
            one.name: {
                "file": f"{one.name}.safetensors",
                "module": one.module,
                "opened": bool(find_quantized_attentions(modules[one.name])),
            }
            for one in report.components
            if one.report is not None
        }
        for name, one in written.items():
            save_module(inside_of(modules[name], str(one["module"])), folder / str(one["file"]))
        write_json(
            folder / FILE,
            KIND,
            {
                "model": pipeline.name.key,
                "place": relative_place(pipeline.name.place, folder),
                "loras": [{"path": path, "scale": scale} for path, scale in pipeline.loras],
                "components": written,
                "files": {str(one["file"]): file_digest(folder / str(one["file"])) for one in written.values()},
                "origin": dict(origin or {}),
                **versions(),
            },
        )
    return Path(out)


def load_pipeline(reference: str | Path) -> MfluxPipeline:
    """A pipeline of mflux, to draw with: in full precision, or quantized by whomever.

    Args:
        reference: ``mflux:NAME[@PLACE]``, a folder in mflux's layout, or one that ``save_pipeline`` wrote.

    Returns:
        The pipeline.

    Raises:
        AdapterError: There is no such model, or mflux is not installed.
        ArtifactError: Files are missing, damaged or another model's.
    """
    folder = Path(reference)
    if not (folder / FILE).is_file():
        return MfluxPipeline.load(str(reference), quantized=True)
    facts = read_json(folder / FILE, KIND, STRUCTURE, "quantize again")
    place = absolute_place(facts["place"], folder)
    loras = [(one["path"], one["scale"]) for one in facts["loras"]]
    pipeline = MfluxPipeline.load(f"{PREFIX}{facts['model']}" + (f"@{place}" if place else ""), loras)
    modules = {component.name: component.module for component in pipeline.components}
    for name, one in facts["components"].items():
        file = folder / one["file"]
        if not file.is_file() or file_digest(file) != facts["files"].get(one["file"]):
            raise ArtifactError(f"{file}: is missing, or is not what was written; copy the folder again")
        if name not in modules:
            raise ArtifactError(f"{folder / FILE}: {pipeline.name} has no component {name!r:.80}; use mflux 0.24")
        layers = open_float8(modules[name], pipeline.dtype)
        module = inside_of(modules[name], one["module"])
        host = host_of(module)
        if one["opened"]:
            host.open(module)
        load_module(module, file, host.time)
        close_float8(modules[name], layers)
    return pipeline


def inside_of(module: nn.Module, path: str) -> nn.Module:
    """A module, or what is at a path in it."""
    found: nn.Module = get_module(module, path) if path else module
    return found
