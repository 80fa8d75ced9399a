"""A recipe on a small host, from calibration to a saved model that draws the same again."""

import mlxquant as mq  # before mlx

# isort: split
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sweep.allocation import FULL_PRECISION


def short(recipe, timed):
    """Without most of its learning, which takes minutes and is not what is asked here; of a recipe with networks over
    time, the overrides ``timed`` leave a layer or two that have one.
    """
    parsed = parse_recipe(recipe, timed if "+tdq" in recipe or "+logsnr" in recipe else ())
    return replace(parsed, learning=replace(parsed.learning, iterations=8))


def predicted(adapter):
    text = adapter.encode([prompt.text for prompt in adapter.prompts("evaluation", 2)])
    noise = mx.random.normal((2, *adapter.latent_shape), key=mx.random.key(1))
    return np.array(adapter.velocity(noise, text, 0.6))


def check_to_a_picture(model, calib, recipe, most, steps, folder):
    """``most`` is how far a prediction may move, of itself; ``folder`` is where the model is saved."""
    prompts, (width, height) = model.adapter.prompts("evaluation", 2), model.adapter.size
    quantized = mq.quantize(model, calib, recipe)
    bits = quantized.facts.get("allocation", {}).get("layers", {})
    whole = {path for path, row in bits.items() if row["weight"] == FULL_PRECISION}
    assert set(quantized.layers) == set(model.adapter.layers()) - whole
    assert all(model.adapter.roles()[path].careful for path in whole)
    found, exact = predicted(quantized.adapter), predicted(model.adapter)
    moved = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-4 < moved < most
    images = quantized.images(prompts, steps=steps)
    assert images.shape == (2, height, width, 3)
    again = mq.QuantizedModel.load(quantized.save(folder))
    assert type(again.adapter) is type(model.adapter)
    assert again.adapter.scheduler == model.adapter.scheduler
    np.testing.assert_array_equal(again.images(prompts, steps=steps), images)
