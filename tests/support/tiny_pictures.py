"""A tiny model that draws, with random weights, for tests that only need the machinery."""

import mlxquant  # noqa: F401  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
from mlx.utils import tree_map

from mlxquant.models.shapes.adapter import MMDiTShapes

TINY = {
    "num_heads": 2, "depth_multimodal": 2, "hidden_size": 32, "vae_latent_dim": 12, "max_latent_resolution": 16,
    "pooled_text_embed_dim": 32, "token_level_text_embed_dim": 32, "frequency_embed_dim": 32,
}  # fmt: skip


def tiny_adapter():
    """Random weights, the same every time, large enough that every layer matters."""
    adapter = MMDiTShapes.blank({"config": TINY})
    keys = iter(mx.random.split(mx.random.key(0), 500))
    adapter.module.update(
        tree_map(lambda x: mx.random.normal(x.shape, key=next(keys)) * 0.15, adapter.module.parameters())
    )
    mx.eval(adapter.module.parameters())
    return adapter
