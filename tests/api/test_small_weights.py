"""A model with rows too small for float16: quantized as well as others, saved, counted and exported as it is."""

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.contents.reader import read_contents
from mlxquant.layers.tree import parameters
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sweep.allocation import allocate

from support.tiny_pictures import tiny_adapter

BLOCK = "multimodal_transformer_blocks.0.image_transformer_block"
SMALL, LARGE = f"{BLOCK}.attn.v_proj", f"{BLOCK}.mlp.fc2"
RECIPES = ("rtn-w4a8", "gptq+refit-w8a8", "gptq+whitened4-w4a16", "rtn-w4a8-g32", "rtn+rotation-w4a8-asym")


@pytest.fixture(scope="module")
def model():
    """Some rows of one layer, and all of another, are a millionth of what they were."""
    adapter = tiny_adapter()
    small, large = (adapter.layers()[path] for path in (SMALL, LARGE))
    small.weight = small.weight * 1e-6
    large.weight = large.weight * mx.where(mx.arange(large.weight.shape[0]) < 4, 1e-6, 1.0)[:, None]
    return mq.Model(adapter)


@pytest.fixture(scope="module")
def calib(model):
    return mq.calibrate(model, prompts=2, steps=2)


def same_layers(one, other):
    assert one.layers.keys() == other.layers.keys()
    for path, layer in one.layers.items():
        assert layer.facts == other.layers[path].facts
        theirs = parameters(other.layers[path])
        for name, value in parameters(layer).items():
            assert value.dtype == theirs[name].dtype
            assert mx.array_equal(value, theirs[name]).item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_small_rows_come_through(model, calib, tmp_path, recipe):
    quantized = mq.quantize(model, calib, recipe)
    for path in (SMALL, LARGE):
        layer = quantized.layers[path]
        assert layer.scales.dtype == mx.float32
        assert layer.facts["scale_dtype"] == "float32"
        assert (layer.branch is not None) == ("whitened" in recipe)
        stands_for = (
            layer.dequantized() if layer.branch is None else layer.dequantized() + mx.array(layer.branch.weight)
        )
        if "rotation" not in recipe:  # which is folded into other layers
            exact, found = np.array(model.adapter.layers()[path].weight), np.array(stands_for)
            errors = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
            assert errors.max() < (0.02 if "w8" in recipe else 0.2)
    assert any(layer.scales.dtype == mx.float16 for layer in quantized.layers.values())

    quantized.save(tmp_path / "saved")
    same_layers(quantized, mq.load(tmp_path / "saved"))
    told = {layer.path: layer.bits_per_weight for layer in read_contents(tmp_path / "saved").layers}
    assert told == {path: layer.bits_per_weight for path, layer in quantized.layers.items()}
    mq.export(quantized, tmp_path / "mlx", "mlx")
    same_layers(quantized, mq.load(tmp_path / "mlx"))
    same_layers(quantized, mq.QuantizedModel(quantized.clone(), quantized.facts))


def test_a_limit_on_the_size_counts_float32_scales(model, calib):
    given = allocate(model.adapter, calib, parse_recipe("rtn-w4a16-g32"), bits_per_weight=6)
    quantized = mq.quantize(model, calib, given.recipe)
    assert quantized.layers[SMALL].scales.dtype == mx.float32
    assert quantized.size.bits_per_quantized_weight == pytest.approx(given.facts["bits_per_weight"])
    assert given.facts["bits_per_weight"] <= 6
    assert given.facts["layers"][SMALL]["bytes"] == quantized.layers[SMALL].nbytes
