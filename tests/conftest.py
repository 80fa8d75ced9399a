"""Shared models: the embedded one, and a tiny one of the same kind with random weights for tests that only need the
machinery.
"""

import os
from importlib.util import find_spec

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import pytest
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


def pytest_runtest_setup(item):
    """Without mlx-lm tests that need it are skipped, and where MLXQUANT_REQUIRE_MLXLM is set they fail."""
    if item.get_closest_marker("mlxlm") and find_spec("mlx_lm") is None:
        refuse = pytest.fail if os.environ.get("MLXQUANT_REQUIRE_MLXLM") else pytest.skip
        refuse("mlx-lm is not installed")


@pytest.fixture
def tiny():
    return mq.Model(tiny_adapter())


@pytest.fixture(scope="session")
def embedded():
    return mq.load("mmdit-shapes")
