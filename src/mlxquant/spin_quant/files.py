"""A GPT that SpinQuant quantized, as one checksummed file: config, tokenizer, integer layers, and the rotation of its
last norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import RecipeError
from ..files import schema
from ..files.atomic import ensure_writable
from ..files.checked import read_tensors, understood, write_tensors
from ..files.parameters import load_parameters
from ..files.pickles import refuse_pickle
from ..layers.kinds import rebuilt, structure
from ..layers.linear import find_quantized
from ..layers.tree import get_module, parameters, set_module
from ..models.gpt.network import CONFIG, GPT, GPTConfig
from ..models.gpt.tokenizers import FACTS, ByteTokenizer, CharTokenizer, tokenizer_from_facts
from ..models.turned_norm import TurnedNorm
from ..qat.convert import put_points, quantizing_points
from ..qat.folders import QUANTIZATION
from ..qat.options import QuantizationOptions
from .held_heads import HeldHeads

FILE, KIND = "spinquant.safetensors", "spinquant-gpt"
FINAL = "model.ln_f"
HEADER = schema.entries(
    {
        "config": CONFIG,
        "tokenizer": FACTS,
        "turned": schema.flag,
        "layers": schema.table_of(structure),
        "held": schema.table_of(HeldHeads.STRUCTURE),
        "facts": schema.table_of(schema.anything),
    }
)


def save_spun(folder: Path, model: GPT, tokenizer: ByteTokenizer | CharTokenizer, facts: Mapping[str, Any]) -> Path:
    """Write a GPT that SpinQuant rotated, quantized or not, as one file; equal input gives equal bytes.

    Args:
        folder: Where to put the file; it is made if it is missing.
        model: The GPT.
        tokenizer: The tokenizer that it reads and writes text with.
        facts: How the model came about, as plain data. Of a model that was trained through rounding the options are
            among them, as ``quantization``: activations that it learned to round stay rounded.

    Returns:
        The file, ``spinquant.safetensors`` in the folder.

    Raises:
        ArtifactError: When the file cannot be written.
        RecipeError: When activations are rounded elsewhere than the facts say.
    """
    told, there = (len(quantizing_points(one)) for one in (_blank(model.config, facts), model))
    if told != there:
        raise RecipeError(
            f"the model rounds activations at {there} points, and facts[{QUANTIZATION!r}] tells of {told}; pass the"
            " facts of the folder that it was trained in"
        )
    ensure_writable(folder)
    header = {
        "config": model.config.to_dict(),
        "tokenizer": tokenizer.facts,
        "turned": isinstance(model.model.ln_f, TurnedNorm),
        "layers": {path: layer.facts for path, layer in find_quantized(model).items()},
        "held": {path: module.facts for path, module in model.named_modules() if isinstance(module, HeldHeads)},
        "facts": dict(facts),
    }
    write_tensors(folder / FILE, KIND, parameters(model), header)
    return folder / FILE


def load_spun(place: Path) -> tuple[GPT, ByteTokenizer | CharTokenizer, dict[str, Any]]:
    """Read what ``save_spun`` wrote.

    Args:
        place: The folder, or the file itself.

    Returns:
        The model in the dtypes of the file, its tokenizer, and the facts of how it came about.

    Raises:
        ArtifactError: When the file is missing, damaged, or not one of ours.
    """
    refuse_pickle(place, f"pass the folder, {place.parent}, with {FILE} in it")
    path = place / FILE if place.is_dir() else place
    arrays, header = read_tensors(path, KIND, schema=HEADER)
    with understood(path, "write the file anew"):
        model = _blank(GPTConfig.from_dict(header["config"]), header["facts"])
        if header["turned"]:
            set_module(model, FINAL, TurnedNorm(model.model.ln_f, mx.zeros((model.config.n_embd,) * 2)))
        layers = {where: rebuilt(facts, None) for where, facts in header["layers"].items()}
        for where, layer in layers.items():
            set_module(model, where, layer)
        for where, facts in header["held"].items():
            set_module(model, where, HeldHeads(get_module(model, where), **facts))
        tokenizer, facts = tokenizer_from_facts(header["tokenizer"]), header["facts"]
    load_parameters(model, arrays, str(path))
    model.load_weights(list(arrays.items()))  # in the dtypes of the file
    for layer in layers.values():
        layer.refresh()
    return model, tokenizer, facts


def _blank(config: GPTConfig, facts: Mapping[str, Any]) -> GPT:
    """A GPT that rounds the activations that the one with these facts has learned to round."""
    model = GPT(config)
    put_points(model, QuantizationOptions(facts.get(QUANTIZATION, {})))
    model.eval()
    return model
