"""T5's encoder, version 1.1 (arXiv 1910.10683; gated GELU), streamed: its layers are read one after the other and
released at once, so that T5-XXL with its 4.7 B parameters encodes in the memory of one layer.

The sums that its layers add to exceed what float16 holds, on any device: it computes in bfloat16 or float32.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import AdapterError
from ...files import schema
from ...layers.fast_cpu import LEAST, gelu_tanh
from ..checkpoints.source import Source, Tensors
from .clip import check_ids
from .loading import Shapes, fitting, in_place, read_config

CLASSES = ("T5EncoderModel", "T5ForConditionalGeneration")
SHARED, EMBEDDED = "shared.weight", "encoder.embed_tokens.weight"  # one table, under either name
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
NORM = "encoder.final_layer_norm.weight"
UNUSED = ("decoder.*", "lm_head.*", SHARED, EMBEDDED)
TOKENS = 1024  # that go through a layer at once; their scores take 64 heads times 2 MB

COUNT, SIZE = schema.whole(1, schema.DEPTH), schema.whole(1, schema.WIDTH)
CONFIG = schema.entries(
    {
        "num_layers": COUNT,
        **dict.fromkeys(("d_model", "d_kv", "d_ff", "num_heads", "vocab_size"), SIZE),
        "feed_forward_proj": schema.one_of("gated-gelu"),
    },
    {
        "relative_attention_num_buckets": schema.whole(4, schema.WIDTH),
        "relative_attention_max_distance": SIZE,
        "layer_norm_epsilon": schema.number(0, 1),
    },
)


def encode_t5(source: Source, component: str, ids: mx.array, mask: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """The last hidden states of prompts; nothing is kept in memory between two calls.

    Args:
        source: Where the model is.
        component: Such as "text_encoder_3".
        ids: Token ids of any length [B,T].
        mask: 1 or true for tokens, 0 or false for the padding that no token shall see [B,T]; None where all is seen.
        dtype: Of the result, and of the computation unless it is float16, for which that is float32.

    Returns:
        [B,T,E].

    Raises:
        AdapterError: An id that the embedding has no row for, or a mask of another shape.
        ArtifactError: The config is another class's or not of version 1.1, a tensor is missing or of another shape.
    """
    config = read_config(source, component, CLASSES, CONFIG)
    if mask is not None and mask.shape != ids.shape:
        raise AdapterError(f"token ids of shape {ids.shape} have a mask of shape {mask.shape}; expected the same")
    check_ids(ids, config["vocab_size"])
    arrays = source.tensors(component)
    table = SHARED if SHARED in arrays else EMBEDDED
    weights = fitting(arrays, needed_shapes(config, table), in_place(source, component), UNUSED)
    del arrays
    internal = mx.float32 if dtype == mx.float16 else dtype
    rows = max(1, TOKENS // max(1, ids.shape[1]))
    chunks = [slice(start, start + rows) for start in range(0, ids.shape[0], rows)]
    embedding = weights.pop(table)
    hidden = [embedding[ids[chunk]].astype(internal) for chunk in chunks]
    bias = _bias(config, weights.pop(BIAS), ids.shape[1])
    mx.eval(hidden, bias)
    del embedding
    for index in range(config["num_layers"]):
        layer = _taken(weights, f"encoder.block.{index}.layer.", internal)
        for at, chunk in enumerate(chunks):
            scores = bias if mask is None else mx.where(mask[chunk, None, None].astype(mx.bool_), bias, LEAST)
            hidden[at] = _layer(config, layer, hidden[at], scores)
            mx.eval(hidden[at])
        del layer
        mx.clear_cache()
    final = weights.pop(NORM).astype(internal)
    found = [mx.fast.rms_norm(x, final, _epsilon(config)).astype(dtype) for x in hidden]
    result = mx.concatenate(found) if found else mx.zeros((*ids.shape, config["d_model"]), dtype=dtype)
    mx.eval(result)
    return result


def _epsilon(config: dict[str, Any]) -> float:
    return float(config.get("layer_norm_epsilon", 1e-6))


def needed_shapes(config: dict[str, Any], table: str) -> Shapes:
    """Name to shape of every tensor that is used."""
    width, inner, hidden = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    found: dict[str, tuple[int, ...]] = {
        table: (config["vocab_size"], width),
        BIAS: (config.get("relative_attention_num_buckets", 32), config["num_heads"]),
        NORM: (width,),
    }
    for index in range(config["num_layers"]):
        first, second = (f"encoder.block.{index}.layer.{part}" for part in (0, 1))
        found |= {f"{part}.layer_norm.weight": (width,) for part in (first, second)}
        found |= {f"{first}.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
        found[f"{first}.SelfAttention.o.weight"] = (width, inner)
        found |= {f"{second}.DenseReluDense.{name}.weight": (hidden, width) for name in ("wi_0", "wi_1")}
        found[f"{second}.DenseReluDense.wo.weight"] = (width, hidden)
    return found


def _taken(weights: Tensors, prefix: str, dtype: mx.Dtype) -> Tensors:
    """The tensors of a layer by the rest of their names, read now and one after the other, so that few of them are in
    memory as the file has them, too. They are taken out of ``weights``, which would keep them otherwise.
    """
    found = {}
    for name in [name for name in weights if name.startswith(prefix)]:
        found[name.removeprefix(prefix)] = value = weights.pop(name).astype(dtype)
        mx.eval(value)
    return found


def _layer(config: dict[str, Any], weights: Tensors, x: mx.array, scores: mx.array) -> mx.array:
    """Attention and MLP of one layer; x [B,T,E], what is added to scores [1 or B,heads,T,T]."""
    batch, length, _ = x.shape
    y = mx.fast.rms_norm(x, weights["0.layer_norm.weight"], _epsilon(config))
    q, k, v = (
        (y @ weights[f"0.SelfAttention.{name}.weight"].T)
        .reshape(batch, length, config["num_heads"], config["d_kv"])
        .transpose(0, 2, 1, 3)
        for name in "qkv"
    )
    y = (
        mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=scores.astype(q.dtype))
        .transpose(0, 2, 1, 3)
        .reshape(batch, length, -1)
    )
    x = x + y @ weights["0.SelfAttention.o.weight"].T
    y = mx.fast.rms_norm(x, weights["1.layer_norm.weight"], _epsilon(config))
    y = gelu_tanh(y @ weights["1.DenseReluDense.wi_0.weight"].T) * (y @ weights["1.DenseReluDense.wi_1.weight"].T)
    return x + y @ weights["1.DenseReluDense.wo.weight"].T


def _bias(config: dict[str, Any], table: mx.array, length: int) -> mx.array:
    """What each head adds to a score for the distance of its tokens [1,heads,T,T] float32; ``table`` is [buckets,
    heads].
    """
    places = np.arange(length)
    distance = places[None] - places[:, None]  # of keys from queries
    most = config.get("relative_attention_max_distance", 128)
    return table.astype(mx.float32)[mx.array(buckets(distance, table.shape[0], most))].transpose(2, 0, 1)[None]


def buckets(distance: np.ndarray[Any, Any], count: int, most: int) -> np.ndarray[Any, Any]:
    """T5's buckets of relative positions: half of them for keys behind the query, and of each half one for every small
    distance, then logarithmically wider ones.

    Args:
        distance: Of a key from its query, in tokens, integers of any shape.
        count: How many buckets there are.
        most: The distance from which on all are in the last one.

    Returns:
        Integers of the same shape, in [0, count).
    """
    half = count // 2
    exact = half // 2
    far = np.abs(distance)
    wide = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    wide = wide / np.float32(np.log(most / exact)) * np.float32(half - exact)  # in float32, as transformers has it
    logarithmic = np.minimum(exact + wide.astype(np.int64), half - 1)
    return np.where(distance > 0, half, 0) + np.where(far < exact, far, logarithmic)
