"""Tiny configurations of SD3Transformer2DModel, one of each kind, and random parameters for them."""

import mlx.core as mx

from mlxquant.layers.tree import parameters
from mlxquant.models.mmdit.network import MMDiT
from mlxquant.models.sd3.names import config_from_diffusers

SIZES = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 12,
}
MEDIUM = SIZES
LARGE = {**SIZES, "qk_norm": "rms_norm"}  # SD3.5's
DUAL = {**LARGE, "dual_attention_layers": [0, 1], "pos_embed_max_size": 24}  # SD3.5-Medium's
KINDS = {"medium": MEDIUM, "large": LARGE, "dual": DUAL, "dual without norms": {**DUAL, "qk_norm": None}}


def random_transformer(said, seed=0):
    """Ours of a configuration of diffusers; no parameter is zero, and none is like another."""
    model = MMDiT(config_from_diffusers(said, "test"))
    keys = mx.random.split(mx.random.key(seed), len(parameters(model)))
    drawn = []
    for key, (name, value) in zip(keys, parameters(model).items(), strict=True):
        noise = mx.random.normal(value.shape, key=key)
        around = 1.0 if "_norm." in name else 0.0
        drawn.append((name, around + noise * (0.3 if value.ndim == 1 else value[0].size ** -0.5)))
    model.load_weights(drawn)
    mx.eval(model.parameters())
    return model
