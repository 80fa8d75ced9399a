"""A GPT as a folder that stock mlx-lm loads: config.json, model.safetensors, and its tokenizer as transformers reads
it.

What only we know (the tokenizer's level, how the model was made, the checksum of its weights) is the entry ``mlxquant``
of config.json, which others pass over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import ArtifactError, reason
from ...files import checked, tensor_layout
from ...files.atomic import atomic_file, ensure_writable
from ...files.checked import file_digest, json_object
from ...files.explain import explain
from ...files.parameters import load_parameters
from ...layers.tree import parameters
from .network import GPT, MODEL_TYPE, GPTConfig
from .tokenizers import ByteTokenizer, CharTokenizer, tokenizer_from_facts

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FACTS = "mlxquant"  # our entry in config.json
ENDLESS = {
    "bos_token_id": None,
    "eos_token_id": None,
}  # no token starts or ends a text; GPT-2's own are outside of the vocabulary
METADATA = {"format": "mlx"}  # by which mlx-lm knows that the weights are in its layout
AGAIN = "write the folder anew"


def save_gpt(
    folder: Path,
    model: GPT,
    tokenizer: ByteTokenizer | CharTokenizer,
    facts: Mapping[str, Any],
    dtype: mx.Dtype | None = None,
) -> None:
    """Write a GPT's parameters, in ``dtype`` or their own, its config with ``facts`` (plain data), and its tokenizer.
    Equal input, equal bytes.

    The config is written last: it vouches for the weights, so a folder that was left half-way is not read.
    """
    ensure_writable(folder)
    arrays = {name: value if dtype is None else value.astype(dtype) for name, value in parameters(model).items()}
    sha256 = write_weights(folder / WEIGHTS, arrays)
    for name, text in tokenizer.files().items():
        _write_text(folder / name, text)
    ours = {"tokenizer": tokenizer.facts, "sha256": sha256, **facts}
    _write_text(folder / CONFIG, checked.canonical({**model.config.to_dict(), **ENDLESS, FACTS: ours}))


def load_gpt(folder: Path) -> tuple[GPT, ByteTokenizer | CharTokenizer, dict[str, Any]]:
    """What ``save_gpt`` wrote: the model in the dtypes of its file, the tokenizer, and the facts.

    Raises ArtifactError on a missing, damaged or foreign folder.
    """
    config = read_config(folder)
    ours = config[FACTS]
    path = folder / WEIGHTS
    if (found := file_digest(path)) != ours.get("sha256"):
        raise ArtifactError(
            f"{path}: checksum {found[:12]}… is not the {str(ours.get('sha256'))[:12]}… that {CONFIG} expects; "
            f"one of the two was changed or damaged, {AGAIN}"
        )
    tokenizer = tokenizer_from_facts(ours.get("tokenizer", {}))
    model, arrays = GPT(GPTConfig.from_dict(config)), read_weights(path)
    load_parameters(model, arrays, str(path))
    model.load_weights(list(arrays.items()))  # in the dtypes of the file
    return (
        model,
        tokenizer,
        {key: ours[key] for key in ours if key not in ("tokenizer", "sha256")},
    )


def is_gpt_folder(folder: Path) -> bool:
    """Whether ``load_gpt`` may read this folder: it has a config.json with our entry."""
    return (folder / CONFIG).is_file() and isinstance(_read_json(folder / CONFIG).get(FACTS), dict)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder that ``save_gpt`` wrote; raises ArtifactError where it is missing, damaged or another
    program's.
    """
    config = _read_json(folder / CONFIG)
    if config.get("model_type") != MODEL_TYPE or not isinstance(config.get(FACTS), dict):
        raise ArtifactError(
            f"{folder / CONFIG}: model type {config.get('model_type')!r} without an entry {FACTS!r}; expected a folder"
            " that 'mlxquant train-gpt' wrote"
        )
    return config


def write_weights(path: Path, arrays: Mapping[str, mx.array]) -> str:
    """Write arrays as safetensors the way mlx-lm does, with no header of ours; returns the sha256 of the file. Equal
    input, equal bytes.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(tensor_layout.header(arrays, METADATA))
        for name in tensor_layout.in_order(arrays):
            file.write(tensor_layout.raw_bytes(arrays[name]))
    return file_digest(path)


def read_weights(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, whoever wrote it; raises ArtifactError on a missing or damaged one."""
    try:
        with path.open("rb") as file:
            entries = tensor_layout.entries(tensor_layout.read_header(file, path.stat().st_size))
            return tensor_layout.read_arrays(file, entries, path.stat().st_size - file.tell(), lambda piece: None)
    except OSError as error:
        raise explain(error, path) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ArtifactError(f"{path}: not a safetensors file, or a damaged one ({reason(error)}); {AGAIN}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json_object(path, AGAIN, AGAIN)
    except OSError as error:
        raise explain(error, path) from error


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
