"""CLIP's text encoders in MLX: CLIP-L (arXiv 2103.00020), OpenCLIP's ViT-H and ViT-bigG, with transformers' parameter
names.

They differ in their config only: sizes, the activation, and whether the pooled output is projected
(``CLIPTextModelWithProjection``) or not (``CLIPTextModel``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...errors import AdapterError, ArtifactError
from ...files import schema
from ...layers.fast_cpu import gelu
from ..checkpoints.source import Source, Tensors
from .loading import fill, in_place, read_config

PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
INNER, PROJECTION = "text_model.", "text_projection.weight"
UNUSED = ("*.position_ids", "vision_model.*", "visual_projection.*", "logit_scale")  # of a whole CLIP, or of old files
BEGAN_AS_END = 2  # the eos_token_id of configs that were written before it was right: no token of CLIP's
END = 49407  # of CLIP's vocabulary, where a config does not say

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),  # OpenAI's
    "gelu": gelu,
}

COUNT, SIZE = schema.whole(1, schema.DEPTH), schema.whole(1, schema.WIDTH)
CONFIG = schema.entries(
    {
        "num_hidden_layers": COUNT,
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"), SIZE),
    },
    {
        "max_position_embeddings": SIZE,
        "projection_dim": SIZE,
        "hidden_act": schema.one_of(*ACTIVATIONS),
        "layer_norm_eps": schema.number(0, 1),
        "eos_token_id": schema.whole(),
    },
)


@dataclass(frozen=True)
class ClipOutput:
    """What a text encoder says of prompts.

    Attributes:
        last: Hidden states after the last layer and the final norm [B,T,D].
        penultimate: Hidden states before the last layer, without the norm [B,T,D].
        pooled: Of ``last`` the state of the end token [B,D], projected to [B,P] where the config has a projection.
    """

    last: mx.array
    penultimate: mx.array
    pooled: mx.array


class Embeddings(nn.Module):
    """Tokens, and where they stand."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.token_embedding = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.position_embedding = nn.Embedding(config.get("max_position_embeddings", 77), config["hidden_size"])

    def __call__(self, ids: mx.array) -> mx.array:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class SelfAttention(nn.Module):
    """Each token sees itself and those before."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, self._heads = config["hidden_size"], config["num_attention_heads"]
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def __call__(self, x: mx.array) -> mx.array:
        batch, length, width = x.shape
        q, k, v = (
            layer(x).reshape(batch, length, self._heads, -1).transpose(0, 2, 1, 3)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(
            mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
            .transpose(0, 2, 1, 3)
            .reshape(batch, length, width)
        )


class MLP(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.fc1 = nn.Linear(config["hidden_size"], config["intermediate_size"])
        self.fc2 = nn.Linear(config["intermediate_size"], config["hidden_size"])
        self._act = ACTIVATIONS[config.get("hidden_act", "quick_gelu")]

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self._act(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(config), MLP(config)
        self.layer_norm1, self.layer_norm2 = _norm(config), _norm(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(config["num_hidden_layers"])]


class TextTransformer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.embeddings, self.encoder = Embeddings(config), Encoder(config)
        self.final_layer_norm = _norm(config)


def _norm(config: dict[str, Any]) -> nn.LayerNorm:
    return nn.LayerNorm(config["hidden_size"], eps=config.get("layer_norm_eps", 1e-5))


class CLIPText(nn.Module):
    """A text encoder; its sizes are those of a config of transformers."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.text_model = TextTransformer(config)
        if config["_class_name"] == PROJECTED:
            self.text_projection = nn.Linear(config["hidden_size"], config.get("projection_dim", 512), bias=False)
        self._end = config.get("eos_token_id", END)

    def __call__(self, ids: mx.array) -> ClipOutput:
        """What the encoder says of token ids [B,T], each row from the begin token to the end token and its padding.

        Raises:
            AdapterError: More tokens than the encoder has positions, or an id that it has no row for.
        """
        inner = self.text_model
        words, positions = inner.embeddings.token_embedding, inner.embeddings.position_embedding
        check_ids(ids, words.weight.shape[0], positions.weight.shape[0])
        x = inner.embeddings(ids)
        penultimate = x
        for layer in inner.encoder.layers:
            penultimate, x = x, layer(x)
        last = inner.final_layer_norm(x)
        pooled = last[mx.arange(ids.shape[0]), self._ends(ids)]
        return ClipOutput(last, penultimate, self.text_projection(pooled) if "text_projection" in self else pooled)

    def _ends(self, ids: mx.array) -> mx.array:
        """Where the first end token of each row is [B]. An old config does not know which it is: that with the highest
        id then, as transformers has it.
        """
        return mx.argmax(ids if self._end == BEGAN_AS_END else ids == self._end, axis=-1)


def check_ids(ids: mx.array, words: int, positions: int | None = None) -> None:
    """Refuse what MLX would read past the end of an embedding for.

    Args:
        ids: [B,T].
        words: Rows of the embedding of tokens.
        positions: Rows of that of positions; None where there is none.

    Raises:
        AdapterError: An id or the length is out of range.
    """
    if positions is not None and ids.shape[1] > positions:
        raise AdapterError(f"{ids.shape[1]} tokens, and the text encoder has {positions} positions; cut the prompt")
    found = np.array(ids)
    if found.size and not 0 <= found.min() <= found.max() < words:
        wrong = found.max() if found.max() >= words else found.min()
        raise AdapterError(
            f"token id {wrong}, and the text encoder's embedding has {words} rows; the tokenizer is another model's"
        )


def load_clip(source: Source, component: str, dtype: mx.Dtype) -> CLIPText:
    """A text encoder with its weights.

    Args:
        source: Where the model is.
        component: Such as "text_encoder".
        dtype: Of weights and results.

    Raises:
        ArtifactError: Its config is another class's or has an unknown activation, a tensor is missing or of another
            shape.
    """
    config = read_config(source, component, (PLAIN, PROJECTED), CONFIG)
    where = in_place(source, component)
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ArtifactError(
            f"{source.place}: {component}/config.json: {config['num_attention_heads']} heads of"
            f" {config['hidden_size']} channels in all, which they do not divide; download it again"
        )
    model = CLIPText(config)
    unused = UNUSED if config["_class_name"] == PROJECTED else (*UNUSED, PROJECTION)
    fill(model, _with_inner_names(source.tensors(component)), dtype, where, unused)
    return model


def _with_inner_names(arrays: Tensors) -> Tensors:
    """Under the names of CLIPTextModelWithProjection: transformers 5 writes a CLIPTextModel without the prefix."""
    if any(name.startswith(INNER) for name in arrays):
        return arrays
    return {name if name == PROJECTION else INNER + name: value for name, value in arrays.items()}
