"""A folder that a stock ``mlx_lm.load`` and ``mlx_lm.generate`` read: config.json, model*.safetensors, and the
tokenizer's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..files import checked
from .plain import PlainModule, write_shards

FILE_LIMIT = 5 << 30  # bytes, as mlx-lm splits its files
METADATA = {"format": "mlx"}
NO_ENDS = {
    "bos_token_id": None,
    "eos_token_id": None,
}  # where a config is silent transformers takes those of the first of its kind
FACTS = "mlxquant"  # our entry in the config.json of a model that we trained; it speaks of the unquantized weights


def write_mlx_lm(folder: Path, plain: PlainModule, config: Mapping[str, Any], tokenizer: Any) -> None:
    """Write a language model of mlx-lm's parameter names into an empty folder.

    ``config`` is config.json of the unquantized model. ``tokenizer`` has ``files()``, names and texts, or
    ``save_pretrained(folder)`` as those of transformers have, or is ``wrapped`` around one of these. Raises ExportError
    without a model type, by which mlx-lm finds the model's class.
    """
    if "model_type" not in config:
        raise ExportError(
            "the config has no model_type, by which mlx-lm finds the model's class; pass the model's own config.json"
        )
    split = plain.nbytes > FILE_LIMIT
    name = "model-{number:05d}-of-{count:05d}.safetensors" if split else "model.safetensors"
    where = write_shards(folder, plain.arrays, METADATA, name, FILE_LIMIT)
    sizes = {"total_size": plain.nbytes, "total_parameters": plain.weights}
    _write(folder / "model.safetensors.index.json", {"metadata": sizes, "weight_map": where})
    _write(folder / "config.json", quantized_config(config, plain))
    if hasattr(tokenizer, "files"):
        for file, text in tokenizer.files().items():
            (folder / file).write_text(text, encoding="utf-8")
    else:
        getattr(tokenizer, "wrapped", tokenizer).save_pretrained(str(folder))


def quantized_config(config: Mapping[str, Any], plain: PlainModule) -> dict[str, Any]:
    """config.json with the setting of every layer by its path, ``false`` for those that stay as they are."""
    kept = NO_ENDS | {
        name: value for name, value in config.items() if name not in ("quantization", "quantization_config", FACTS)
    }
    if plain.usual is None:
        return kept
    quantization = {**plain.usual, **plain.layers, **dict.fromkeys(plain.unquantized, False)}
    return {**kept, "quantization": quantization, "quantization_config": quantization}


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(checked.canonical(data), encoding="utf-8")
