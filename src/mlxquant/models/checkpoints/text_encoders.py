"""Text encoders in single files and in files of their own: which it is, and what its config.json would say, from the
names and shapes of its tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .source import Tensors

HEAD = 64  # channels of a head of every CLIP text encoder
EMBEDDED = ("shared.weight", "encoder.embed_tokens.weight")  # T5's table of tokens, under either name
T5_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
UMT5_BIAS, GATED = T5_BIAS.replace(".0.", ".1.", 1), "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
CLIP_WORDS, CLIP_LAYER = "text_model.embeddings.token_embedding.weight", "text_model.encoder.layers."
CLIP_H, CLIP_G = 23, 31  # layers from which on ComfyUI's detect_te_model takes a CLIP for that; fewer are CLIP-L
PROJECTION, OLD_PROJECTION = "text_projection.weight", "text_projection"


def below(arrays: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def prefix_of(names: Collection[str], mark: str) -> str | None:
    """What stands before all names of a file that has a tensor ``mark``, but for single ones, as ``logit_scale``; None
    where it has none, or other parts, too.
    """
    found = next((name.removesuffix(mark) for name in names if name.endswith(mark)), None)
    alone = found is not None and all(name.startswith(found) or "." not in name for name in names)
    return found if alone else None


def clip_prefix(shapes: Mapping[str, tuple[int, ...]], large: bool) -> str | None:
    """What stands before the names of CLIP-L's tensors, or of the ``large`` CLIP-G's; None where a file is no such."""
    prefix = prefix_of(shapes, CLIP_WORDS)
    layers = {name.split(CLIP_LAYER)[1].split(".")[0] for name in shapes if CLIP_LAYER in name}
    fits = len(layers) >= CLIP_G if large else 0 < len(layers) < CLIP_H
    return prefix if fits else None


def t5_prefix(shapes: Mapping[str, tuple[int, ...]], width: int) -> str | None:
    """What stands before the names of the tensors of a T5 of version 1.1 with ``width`` channels; None where a file is
    no such. UMT5, as Wan has it, has a bias of positions in every block; T5 of version 1 is not gated.
    """
    prefix = prefix_of(shapes, T5_BIAS)
    if prefix is None or prefix + GATED not in shapes or prefix + UMT5_BIAS in shapes:
        return None
    return prefix if any(shapes.get(prefix + name, (0, 0))[1] == width for name in EMBEDDED) else None


def loose_clip(arrays: Tensors) -> Tensors:
    """The tensors of a CLIP text encoder in a file of its own. Files that ComfyUI's CLIPSave once wrote have the
    projection as a parameter, turned.
    """
    found = {name: value for name, value in arrays.items() if name != OLD_PROJECTION}
    if PROJECTION not in found and (old := arrays.get(OLD_PROJECTION)) is not None:
        found[PROJECTION] = old.T
    return found


def clip_config(tensors: Tensors, activation: str) -> dict[str, Any]:
    """Of a CLIP text encoder.

    Args:
        tensors: Under transformers' names.
        activation: Of its MLPs, "quick_gelu" for OpenAI's and "gelu" for others.
    """
    words = tensors["text_model.embeddings.token_embedding.weight"]
    layers = {name.split(".")[3] for name in tensors if name.startswith("text_model.encoder.layers.")}
    projection = tensors.get("text_projection.weight")
    config = {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "hidden_size": words.shape[1],
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        "num_attention_heads": words.shape[1] // HEAD,
        "num_hidden_layers": len(layers),
        "vocab_size": words.shape[0],
        "eos_token_id": words.shape[0] - 1,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
    }
    return config if projection is None else {**config, "projection_dim": projection.shape[0]}


def t5_config(tensors: Tensors) -> dict[str, Any]:
    """Of T5's encoder, version 1.1; ``tensors`` are under transformers' names."""
    words = next(tensors[name] for name in EMBEDDED if name in tensors)
    bias, first = tensors[T5_BIAS], "encoder.block.0.layer"
    blocks = {name.split(".")[2] for name in tensors if name.startswith("encoder.block.")}
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": words.shape[1],
        "d_kv": tensors[f"{first}.0.SelfAttention.q.weight"].shape[0] // bias.shape[1],
        "d_ff": tensors[f"{first}.1.DenseReluDense.wi_0.weight"].shape[0],
        "num_heads": bias.shape[1],
        "num_layers": len(blocks),
        "vocab_size": words.shape[0],
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": bias.shape[0],
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    }
