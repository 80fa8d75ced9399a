"""One function that writes a model for any of the tools: whole or not at all, with a record of what is in it. A folder
it can also make one file of, an archive, and a folder of that.

``export.json`` in the folder says what was written from what, and has the checksum of every file; by it the folder is
known as ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..api.model import Model, QuantizedModel
from ..errors import ExportError
from ..files.atomic import atomic_folder, refuse_existing
from ..models.language import LanguageAdapter
from ..models.mflux.pipeline import MfluxPipeline
from ..progress import Progress, silent
from .archive import unpack_archive, write_archive
from .diffusionkit import MODELS, float_module, write_diffusionkit
from .mflux import COMPONENT, check_component, write_mflux
from .mlx import write_mlx
from .mlx_lm import write_mlx_lm
from .pipelines import write_pipeline
from .plain import FLOATS, prepared
from .record import write_record

ORIGIN = ("recipe", "calibration")  # of a quantized model's facts, what goes with it
PATHS = ARCHIVE, FOLDER = ("archive", "folder")  # what files are made of files
TARGETS = ("mlx-lm", "mlx", "mflux", "diffusionkit", *PATHS)


def export(
    model: Model | nn.Module | MfluxPipeline | str | Path,
    out: str | Path,
    target: str,
    *,
    drop_activations: bool = False,
    dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    component: str = COMPONENT,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a model as a folder that another tool reads, the codes bit for bit: whole, or not at all.

    Args:
        model: A model, or for "mlx-lm" and "mflux" a bare module, or for "mflux" a whole pipeline. For "archive" the
            folder of any of these, for "folder" an archive.
        out: The folder to write; for "archive" a file.
        target: Who reads it: "mlx-lm", "mlx", "mflux" or "diffusionkit". Or "archive": one file with all of a
            folder in fewer bytes; and "folder": the folder that an archive was made of, byte for byte.
        drop_activations: Whether to leave activation scales out where the target has no place for them; else they are
            refused.
        dtype: Of every floating tensor, "float16", "bfloat16" or "float32"; None keeps each one's own. For "mlx-lm" and
            "mflux" alone.
        config: Of a bare module for "mlx-lm": what its config.json says.
        tokenizer: Of a bare module for "mlx-lm".
        component: As what "mflux" has the module.
        force: Whether to replace a folder, or an archive, that mlxquant wrote.
        progress: Of what is packed or unpacked.

    Returns:
        ``out``, ``target``, ``bytes``, ``bits_per_weight``, how many ``layers`` are quantized, and ``notes`` for the
        user; of a pipeline layers and notes by component. Of an archive ``bytes_before`` in place of bits and notes, of
        a folder that was one ``files``.

    Raises:
        ExportError: On what the target cannot hold, by the layer's name, and on arguments that it does not take.
        ArtifactError: When the folder cannot be written.
    """
    if target not in TARGETS:
        raise ExportError(f"no target {target!r}; expected one of {', '.join(TARGETS)}")
    if target in PATHS or isinstance(model, str | Path):
        return repacked(model, out, target, {"dtype": dtype, "drop_activations": drop_activations}, force, progress)
    if dtype not in (None, *FLOATS):
        raise ExportError(f"no dtype {dtype!r}; expected one of {', '.join(FLOATS)}, or none to keep each tensor's own")
    if dtype is not None and target in ("mlx", "diffusionkit"):
        raise ExportError(f"--target {target} has its own dtypes; leave --dtype out")
    if isinstance(model, MfluxPipeline):
        if target != "mflux":
            raise ExportError(f"{model.name} is a pipeline of mflux, which nothing else reads; use --target mflux")
        return write_pipeline(model, out, force=force, drop_activations=drop_activations, dtype=dtype)
    module = model.adapter.module if isinstance(model, Model) else model
    out = Path(out)
    refuse_existing(out, force)
    with atomic_folder(out, force) as folder:
        if target == "mlx":
            plain = write_mlx(folder, quantized_model(model), drop_activations)
        elif target == "diffusionkit":
            place = sd3_place(model)
            plain = float_module(module, target, drop_activations)
            write_diffusionkit(folder, plain, place)
        elif target == "mflux":
            check_component(module)
            plain = prepared(module, target, drop_activations, dtype)
            write_mflux(folder, plain, component)
        else:
            config, tokenizer = language(model, config, tokenizer)
            plain = prepared(module, target, drop_activations, dtype)
            write_mlx_lm(folder, plain, config, tokenizer)
        facts: dict[str, Any] = {
            "target": target,
            "bits_per_weight": plain.bits_per_weight,
            "notes": plain.notes,
        }
        known = model.facts if isinstance(model, QuantizedModel) else {}
        origin = {key: known[key] for key in ORIGIN if key in known}
        facts["bytes"] = write_record(folder, {**facts, **origin}, plain.layers)
    return {"out": str(out), **facts, "layers": len(plain.layers)}


def repacked(
    model: Any, out: str | Path, target: str, changes: Mapping[str, Any], force: bool, progress: Progress
) -> dict[str, Any]:
    """A folder as one file, or such a file as its folder; ``changes`` are what other targets can do to a model."""
    if target not in PATHS or not isinstance(model, str | Path):
        paths = f"{' and '.join(PATHS)} take a path, and other targets a model"
        raise ExportError(f"{paths}; found {named(model)} for --target {target}")
    if asked := [name for name, value in changes.items() if value]:
        raise ExportError(f"--target {target} leaves files as they are; leave --{asked[0].replace('_', '-')} out")
    write = write_archive if target == ARCHIVE else unpack_archive
    return {"target": target, **write(Path(model), Path(out), force, progress)}


def quantized_model(model: Model | nn.Module) -> QuantizedModel:
    """A model that our own loader can read again."""
    if not isinstance(model, QuantizedModel):
        raise ExportError(
            f"--target mlx writes what mlxquant.quantize made, found {named(model)}; save a bare module with"
            " save_module"
        )
    return model


def sd3_place(model: Model | nn.Module) -> str:
    """Where the rest of a model that DiffusionKit has comes from."""
    if not isinstance(model, Model) or model.name not in MODELS:
        raise ExportError(f"DiffusionKit loads {MODELS[0]} alone, found {named(model)}; write it with --target mlx")
    return model.adapter.place


def named(model: Any) -> str:
    if isinstance(model, str | Path):
        return f"the path {model}"
    return f"{type(model).__name__} {model.name}" if isinstance(model, Model) else f"a bare {type(model).__name__}"


def language(
    model: Model | nn.Module, config: Mapping[str, Any] | None, tokenizer: Any
) -> tuple[Mapping[str, Any], Any]:
    """config.json and the tokenizer of a language model, its own or those that were passed."""
    if isinstance(model, Model):
        if not isinstance(model.adapter, LanguageAdapter):
            raise ExportError(f"mlx-lm runs language models, found {named(model)}; write it with --target mlx")
        return model.adapter.describe()["config"], model.adapter.tokenizer
    if config is None or tokenizer is None:
        raise ExportError(f"{named(model)} goes to mlx-lm with its config and its tokenizer; pass both")
    return config, tokenizer
