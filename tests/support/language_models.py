"""Tiny language models for tests: a GPT, and mlx-lm's from their configs, with weights at random and norms that have
gains.
"""

import importlib

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxquant.models.gpt.network import GPT, GPTConfig
from mlxquant.sampling.text import sample_tokens

CONFIG = GPTConfig(vocab_size=40, n_positions=24, n_embd=32, n_head=2, n_layer=2)
LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "vocab_size": 40, "head_dim": 8, "max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip


def randomised(model, seed=0, scale=0.25):
    """Every parameter at random: matrices around 0, gains around 1."""
    rng = np.random.default_rng(seed)
    values = []
    for name, value in tree_flatten(model.parameters()):
        gain = "weight" in name and value.ndim == 1
        values.append((name, mx.array((rng.standard_normal(value.shape) * scale + gain).astype(np.float32))))
    model.load_weights(values)
    return model


def tiny_gpt(config=CONFIG, seed=0):
    return randomised(GPT(config), seed)


def tiny_mlx_lm(kind, **changes):
    """A model of mlx-lm of this type; needs the package."""
    module = importlib.import_module(f"mlx_lm.models.{'llama' if kind == 'mistral' else kind}")
    facts = CONFIG.to_dict() if kind == "gpt2" else {**LLAMA, **changes}
    return randomised(module.Model(module.ModelArgs.from_dict({**facts, "model_type": kind})))


def own_text(model, count=2, batch=24, length=16, seed=0):
    """Tokens that a model would write itself: no other network has less loss on them."""
    first = np.random.default_rng(seed).integers(0, 40, (batch, 1))
    return [sample_tokens(model, first, length - 1, seed=100 * seed + i) for i in range(count)]


def tokens(batch=2, length=16, seed=0, size=40):
    return np.random.default_rng(seed).integers(0, size, (batch, length)).astype(np.int32)
