"""Recipes on a tiny PixArt, from calibration to a saved model that draws the same again."""

import mlxquant as mq  # before mlx

# isort: split

import mlx.core as mx
import pytest

from mlxquant.layers.attention import QuantizedAttention
from mlxquant.models.pixart.adapter import PixArtAlpha

from support.picture_recipes import check_to_a_picture, short
from support.pixart import StubComponents, small_adapter

TIMED = ("*.attn2.to_[qk]=w8a8", "*=w8a16")  # a network a layer
RECIPES = {  # and how far a prediction may move, of itself
    "rtn-w4a8": 0.2,
    "rtn-w8a16": 0.02,
    "gptq-w4a8": 0.2,
    "gptq+smoothquant+rotation-w4a8": 0.2,
    "svdquant-w4a8": 0.2,
    "mixed-w4a8": 0.2,
    "taqdit-w4a8": 0.2,
    "tcaqdm-w6a6": 0.5,
    "rtn+tdq-w8a8": 0.05,
    "rtn+logsnr-w8a8": 0.05,
    "qronos+damped-w4a8": 0.2,
    "rtn+softmax8-w8a8": 0.05,
}
PROMPTS = 2
STEPS = 4


@pytest.fixture(scope="module")
def model():
    return mq.Model(small_adapter("one block"))


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
    monkeypatch.setattr("mlxquant.models.pixart.adapter.PixArtComponents", StubComponents)


@pytest.mark.parametrize("recipe", RECIPES)
def test_from_calibration_to_a_picture(model, calib, recipe, tmp_path):
    assert (type(model.adapter), model.adapter.size) == (PixArtAlpha, (64, 96))
    check_to_a_picture(model, calib, short(recipe, TIMED), RECIPES[recipe], STEPS, tmp_path / "model")


def test_opened_attentions_keep_the_mask(model, calib):
    quantized = mq.quantize(model, calib, "rtn+softmax4-w8a16").adapter
    attentions = [one for block in quantized.module.transformer_blocks for one in (block.attn1, block.attn2)]
    assert all(isinstance(one.sdpa, QuantizedAttention) for one in attentions)
