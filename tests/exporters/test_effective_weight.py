"""One matrix in the place of a quantized layer: what DiffusionKit gets, with whatever the layer does to its input
folded in.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.exporters.diffusionkit import checkpoint_arrays, effective_weight, float_module
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.numerics.low_rank import LowRank


@pytest.mark.parametrize(
    "options", [{}, {"rotation": 16}, {"divisor": True}, {"rotation": 64, "divisor": True, "branch": True}]
)
def test_one_matrix_stands_for_a_whole_layer(options):
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((24, 64)).astype(np.float32)
    grid = fit_extremes(weight, WeightFormat(4))
    layer = QuantizedLinear(
        grid.quantize(weight), grid, rotation=options.get("rotation", 1),
        divisor=mx.array(generator.uniform(0.5, 2, 64), mx.float32) if "divisor" in options else None,
        branch=LowRank(generator.standard_normal((24, 3)), generator.standard_normal((3,
        64))) if "branch" in options else None,
    )  # fmt: skip
    x = mx.array(generator.standard_normal((5, 64)), mx.float32)
    np.testing.assert_allclose(np.array(x @ effective_weight(layer).T), np.array(layer(x)), atol=3e-5)


@pytest.mark.parametrize(("size", "lost"), [(1e-3, False), (1e-6, True)])
def test_rows_for_which_float16_has_fewer_digits_are_told(size, lost):
    weight = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
    weight[[3, 7]] *= size
    module = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 8))
    grid = fit_extremes(weight, WeightFormat(8))
    module.layers[0] = QuantizedLinear(grid.quantize(weight), grid)
    notes = float_module(module, "it").notes
    assert len(notes) == 1 + lost
    if lost:
        assert notes[1].startswith("2 rows of weights are so small")


def test_names_and_layouts_are_the_checkpoints():
    block = "multimodal_transformer_blocks.3.image_transformer_block"
    rows = {f"{block}.attn.{one}_proj.{leaf}": mx.full((2, 4) if leaf == "weight" else (2,), i) for i,
    one in enumerate("qkv")
            for leaf in ("weight", "bias") if (one, leaf) != ("k", "bias")}  # fmt: skip
    others = {
        f"{block}.attn.o_proj.bias": mx.ones(2),
        f"{block}.adaLN_modulation.layers.1.weight": mx.ones((2, 2)),
        "y_embedder.mlp.layers.0.bias": mx.ones(2),
        "x_pos_embedder.pos_embed.weight": mx.ones((9, 2)),
        "x_embedder.proj.weight": mx.arange(32).reshape(2, 2, 2, 4),
        "multimodal_transformer_blocks.0.text_transformer_block.mlp.fc1.weight": mx.ones((2, 2)),
    }
    found = checkpoint_arrays({**rows, **others})
    prefix = "model.diffusion_model."
    assert {name.removeprefix(prefix): value.shape for name, value in found.items()} == {
        "joint_blocks.3.x_block.attn.qkv.weight": (6, 4),
        "joint_blocks.3.x_block.attn.qkv.bias": (6,),
        "joint_blocks.3.x_block.attn.proj.bias": (2,),
        "joint_blocks.3.x_block.adaLN_modulation.1.weight": (2, 2),
        "y_embedder.mlp.0.bias": (2,),
        "pos_embed": (1, 9, 2),
        "x_embedder.proj.weight": (2, 4, 2, 2),
        "joint_blocks.0.context_block.mlp.fc1.weight": (2, 2),
    }
    assert np.array(found[f"{prefix}joint_blocks.3.x_block.attn.qkv.weight"])[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array(found[f"{prefix}joint_blocks.3.x_block.attn.qkv.bias"]).tolist() == [0, 0, 0, 0, 2, 2]
