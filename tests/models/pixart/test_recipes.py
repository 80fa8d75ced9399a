"""Recipes on a tiny PixArt, from calibration to a saved model that draws the same again."""

import mlxquant as mq  # before mlx

# isort: split
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.layers.attention import QuantizedAttention
from mlxquant.models.pixart.adapter import PixArtAlpha
from mlxquant.recipes.grammar import parse_recipe

from support.pixart import StubComponents, small_adapter

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


def short(recipe):
    """Without most of its learning, which takes minutes and is not what is asked here."""
    few = ["*.attn2.to_[qk]=w8a8", "*=w8a16"] if "+tdq" in recipe or "+logsnr" in recipe else []  # a network a layer
    parsed = parse_recipe(recipe, few)
    return replace(parsed, learning=replace(parsed.learning, iterations=8))


def predicted(adapter):
    text = adapter.encode([prompt.text for prompt in adapter.prompts("evaluation", 2)])
    noise = mx.random.normal((2, *adapter.latent_shape), key=mx.random.key(1))
    return np.array(adapter.velocity(noise, text, 0.6))


@pytest.mark.parametrize("recipe", RECIPES)
def test_from_calibration_to_a_picture(model, calib, recipe, tmp_path):
    prompts = model.adapter.prompts("evaluation", 2)
    quantized = mq.quantize(model, calib, short(recipe))
    assert set(quantized.layers) == set(model.adapter.layers())
    found, exact = predicted(quantized.adapter), predicted(model.adapter)
    moved = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-4 < moved < RECIPES[recipe]
    images = quantized.images(prompts, steps=STEPS)
    assert images.shape == (2, 96, 64, 3)
    again = mq.QuantizedModel.load(quantized.save(tmp_path / "model"))
    assert type(again.adapter) is PixArtAlpha
    np.testing.assert_array_equal(again.images(prompts, steps=STEPS), images)


def test_opened_attentions_keep_the_mask(model, calib):
    quantized = mq.quantize(model, calib, "rtn+softmax4-w8a16").adapter
    attentions = [one for block in quantized.module.transformer_blocks for one in (block.attn1, block.attn2)]
    assert all(isinstance(one.sdpa, QuantizedAttention) for one in attentions)
