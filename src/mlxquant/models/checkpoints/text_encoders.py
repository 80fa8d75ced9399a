"""What the config.json of a text encoder would say, from the shapes of its tensors in a single file."""

from __future__ import annotations

from typing import Any

from .source import Tensors

HEAD = 64  # channels of a head of every CLIP text encoder
EMBEDDED = ("shared.weight", "encoder.embed_tokens.weight")  # T5's table of tokens, under either name
T5_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def below(arrays: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


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
