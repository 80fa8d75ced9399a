"""Trained folders as models that run quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from ..files.checked import read_tensors, write_tensors
from ..models.gpt.files import load_gpt
from ..models.gpt.network import GPT
from ..models.gpt.tokenizers import ByteTokenizer, CharTokenizer
from .convert import kept_activations, quantize_while_training, restore_activations
from .options import QuantizationOptions

ACTIVATIONS, KIND = "activations.safetensors", "stored-activations"
QUANTIZATION = "quantization"  # the fact that holds a folder's options


def quantized_gpt(folder: Path) -> tuple[GPT, ByteTokenizer | CharTokenizer, dict[str, Any]]:
    """A model that 'mlxquant train-gpt' wrote as it runs after training: weights and activations rounded to nearest,
    stored activations at their points. One that was trained without quantization comes as it is.

    Raises ArtifactError on a missing, damaged or foreign folder.
    """
    model, tokenizer, facts = load_gpt(folder)
    quantize_while_training(model, QuantizationOptions(facts.get(QUANTIZATION, {})))
    model.eval()
    if (folder / ACTIVATIONS).exists():
        restore_activations(model, read_tensors(folder / ACTIVATIONS, KIND)[0])
    return model, tokenizer, facts


def save_activations(folder: Path, model: GPT) -> None:
    """Write what the points kept, if they kept anything."""
    kept: dict[str, mx.array] = kept_activations(model)
    if kept:
        write_tensors(folder / ACTIVATIONS, KIND, kept)
