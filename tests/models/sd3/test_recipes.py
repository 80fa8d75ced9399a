"""Recipes on a tiny Stable Diffusion 3.5 with a second attention, from calibration to a saved model that draws the same
again; and the six steps.
"""

import mlxquant as mq  # before mlx

# isort: split

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.layers.attention import QuantizedAttention
from mlxquant.models.sd3.adapter import SD3Components, SD35Medium

from support.command_line import succeed
from support.picture_recipes import check_to_a_picture, short
from support.sd3_folder import stub_text, write_drawing
from support.sd3_transformers import DUAL

TIMED = ("*.attn2.[qk]_proj=w8a8", "*=w8a16")  # a network a layer
RECIPES = {  # and how far a prediction may move, of itself
    "rtn-w4a8": 0.3,
    "rtn-w8a16": 0.02,
    "gptq-w4a8": 0.3,
    "gptq+smoothquant+rotation-w4a8": 0.3,
    "mixed-w4a8": 0.3,
    "taqdit-w4a8": 0.3,
    "tcaqdm-w6a6": 0.5,
    "rtn+tdq-w8a8": 0.05,
    "rtn+logsnr-w8a8": 0.05,
    "qronos+damped-w4a8": 0.3,
    "rtn+softmax8-w8a8": 0.05,
}
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    write_drawing(folder, {**DUAL, "num_layers": 2, "dual_attention_layers": [0]})
    return folder


@pytest.fixture(autouse=True, scope="module")
def stubbed():
    """Every model has a stub for text encoders, and MLX's compiler, which takes longer than all else here, is off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SD3Components, "_encode", lambda self, prompts: stub_text(prompts))
        mx.disable_compile()
        yield
        mx.enable_compile()


@pytest.fixture(scope="module")
def model(folder):
    return mq.load(folder, size=64)


@pytest.fixture(scope="module")
def calib(model):
    return mq.calibrate(model, 2, STEPS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_from_calibration_to_a_picture(model, calib, recipe, tmp_path):
    assert (type(model.adapter), model.adapter.size) == (SD35Medium, (64, 64))
    check_to_a_picture(model, calib, short(recipe, TIMED), RECIPES[recipe], STEPS, tmp_path / "model")


def test_both_attentions_are_opened(model, calib):
    blocks = mq.quantize(model, calib, "rtn+softmax4-w8a16").adapter.module.multimodal_transformer_blocks
    assert all(isinstance(one, QuantizedAttention) for one in (blocks[0].sdpa, blocks[0].sdpa2, blocks[1].sdpa))


def test_q_k_and_v_of_each_attention_share_their_inputs(model, calib):
    """They read one tensor: one divisor, one table of scales."""
    quantized = mq.quantize(model, calib, "smoothquant-w8a8")
    image = "multimodal_transformer_blocks.0.image_transformer_block"
    for attention in ("attn", "attn2"):
        tables = [np.array(quantized.layers[f"{image}.{attention}.{name}_proj"].table.sigma) for name in "qkv"]
        np.testing.assert_array_equal(tables[0], tables[1])
        np.testing.assert_array_equal(tables[0], tables[2])


def test_the_six_steps(folder, tmp_path):
    calib, where = tmp_path / "calib", ["--model", folder]
    small, some = ("--num-images", 2), ("--calib-dir", calib, "--num-images", 2, "--stride", 2)
    drawing = ("--num-steps", 3, "--calib-dir", calib, "--size", 64)
    succeed("generate-calibration-data", *where, *small, *drawing)
    succeed("cache-adaround-data", *where, *some)
    learned = ("--cache-dir", calib / "adaround_cache", "--output-dir", tmp_path / "weights")
    succeed("adaround-optimize", *where, *learned, "--iters", 3, "--start", "gptq")
    succeed("collect-layer-activations", *where, *some)
    succeed("analyze-activations", *where, "--stats", calib / "activations" / "layer_statistics.json")
    tracks = ("--adaround-output", tmp_path / "weights", "--quant-config", calib / "activations" / "quant_config.json")
    picture = ("--prompt", "a cat", "--num-steps", 2, "--size", 64, "--output-image", tmp_path / "a.png", "--compare")
    facts, _ = succeed("load-adaround-model", *where, *tracks, *picture, "--save", tmp_path / "model")
    assert set(facts["models"]) == {"RTN", "V1", "V2"}
    assert all(np.isfinite(row["psnr_db"]) for row in facts["models"].values())
    loaded = mq.load(tmp_path / "model")
    roles = mq.load(folder).adapter.roles()
    assert {path for path, role in roles.items() if role in ("attention", "mlp")} <= loaded.layers.keys()
    assert loaded.generate("a cat", steps=1).size == (64, 64)
