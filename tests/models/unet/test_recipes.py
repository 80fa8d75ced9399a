"""Recipes on a tiny UNet, from calibration to a saved model that draws the same again."""

import mlxquant as mq  # before mlx

# isort: split

import mlx.core as mx
import pytest

from mlxquant.layers.attention import QuantizedAttention
from mlxquant.layers.convolutions import QuantizedConv2d
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.tree import get_module
from mlxquant.models.unet.adapter import StableDiffusion

from support.picture_recipes import check_to_a_picture, short
from support.tiny_unet import FEW, Stub, small_adapter

TIMED = ("mid_block.resnets.0.conv1=w8a8", "mid_block.*attn2.to_q=w8a8", "*=w8a16")  # two layers with a network each
RECIPES = {  # and how far a prediction may move, of itself
    "rtn-w4a8": 0.3,
    "rtn-w8a16": 0.02,
    "gptq-w4a8": 0.3,
    "smoothquant+rotation-w4a8": 0.3,
    "mixed-w4a8": 0.2,
    "taqdit-w4a8": 0.2,
    "tcaqdm-w6a6": 0.3,
    "rtn+tdq-w8a8": 0.05,
    "rtn+logsnr-w8a8": 0.05,
    "qronos+damped-w4a8": 0.2,
}
PROMPTS, STEPS = 2, 3


@pytest.fixture(scope="module")
def model():
    return mq.Model(small_adapter(FEW))


@pytest.fixture(scope="module")
def calib(model):
    return mq.calibrate(model, PROMPTS, STEPS)


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """MLX's compiler takes longer than all else here."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(autouse=True)
def stubbed(monkeypatch):
    """Models that are loaded have stubs around them, too."""
    monkeypatch.setattr("mlxquant.models.unet.adapter.CLIPComponents", Stub)


@pytest.mark.parametrize("recipe", RECIPES)
def test_from_calibration_to_a_picture(model, calib, recipe, tmp_path):
    assert (type(model.adapter), model.adapter.size) == (StableDiffusion, (64, 64))
    check_to_a_picture(model, calib, short(recipe, TIMED), RECIPES[recipe], STEPS, tmp_path / "model")


def test_layers_of_every_kind_and_those_that_want_care(model, calib):
    quantized = mq.quantize(model, calib, "rtn+softmax4-w4a8")
    kinds = {path: type(layer) for path, layer in quantized.layers.items()}
    assert kinds["mid_block.resnets.0.conv1"] is kinds["mid_block.attentions.0.proj_in"] is QuantizedConv2d
    assert kinds["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"] is QuantizedLinear
    bits = {path: layer.format.bits for path, layer in quantized.layers.items()}
    careful = {path for path, role in model.adapter.roles().items() if role.careful}
    assert {"conv_in", "conv_out", "time_embedding.linear_2", "mid_block.resnets.0.time_emb_proj"} <= careful
    assert {path for path, count in bits.items() if count == 8} == careful
    block = get_module(quantized.adapter.module, "mid_block.attentions.0.transformer_blocks.0")
    assert all(isinstance(one.sdpa, QuantizedAttention) for one in (block.attn1, block.attn2))


def test_divisions_go_into_norms_and_values(model, calib):
    """So that of a transformer's layers only those that read the text divide while they run."""
    quantized = mq.quantize(model, calib, "smoothquant-w8a16")
    running = {path for path, layer in quantized.layers.items() if getattr(layer, "divisor", None) is not None}
    assert running <= {f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{name}" for name in "kv"}
