"""Ideogram 4, whose weights are 8-bit floats in layers of its own."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.api.dry_run import plan_pipeline
from mlxquant.api.pipeline_files import load_pipeline, save_pipeline
from mlxquant.api.pipelines import quantize_pipeline
from mlxquant.errors import RecipeError
from mlxquant.models.mflux.float8 import close_float8, find_float8, open_float8
from mlxquant.models.mflux.pipeline import MfluxPipeline

from support.mflux_checkpoints import small_models
from support.mflux_quantized import CALIBRATION, SIZE, dense, drawn


class Float8(nn.Module):
    """A layer as Ideogram 4 has them."""

    def __init__(self, bias):
        super().__init__()
        self.weight = mx.to_fp8(mx.random.normal((8, 4), key=mx.random.key(0)))
        self.weight_scale = mx.arange(1, 9).astype(mx.float32)
        self.bias = mx.arange(8).astype(mx.float32) if bias else None


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Float8(True), Float8(False)]
        self.other = nn.Linear(4, 4)


def test_a_linear_stands_for_8_bit_floats_and_leaves_again():
    module = Pair()
    first, second = module.layers
    opened = open_float8(module, mx.float32)
    assert sorted(opened) == ["layers.0", "layers.1"]
    exact = mx.from_fp8(first.weight, dtype=mx.float32) * first.weight_scale[:, None]
    np.testing.assert_array_equal(module.layers[0].weight, exact)
    np.testing.assert_array_equal(module.layers[0](mx.ones((1, 4))), mx.ones((1, 4)) @ exact.T + first.bias)
    assert "bias" not in module.layers[1]
    assert not find_float8(module)
    module.layers[1] = quantized = nn.QuantizedLinear(64, 64)
    close_float8(module, opened)
    assert module.layers[0] is first
    assert module.layers[1] is quantized is not second


@pytest.mark.mflux
@pytest.mark.slow
def test_what_is_not_quantized_keeps_them():
    folder = dense("ideogram-4-fp8")
    with small_models():
        pipeline = MfluxPipeline.load(str(folder))
        before = drawn(pipeline)
        arguments = {"text_recipe": None, "steps": 2, "size": SIZE}
        plan = plan_pipeline(pipeline, 1, "rtn-w8a16-g64", **arguments, measure=False)
        np.testing.assert_array_equal(drawn(pipeline), before)
        report = quantize_pipeline(pipeline, CALIBRATION[:1], "rtn-w8a16-g64", **arguments)
    assert [one.after for one in plan.components] == [one.after for one in report.components]
    assert len(find_float8(pipeline.pipeline.text_encoder)) == 3 * 7
    assert not find_float8(pipeline.pipeline.conditional_transformer)
    assert not find_float8(pipeline.pipeline.unconditional_transformer)


@pytest.mark.mflux
@pytest.mark.slow
def test_its_text_encoder_has_the_same_bits_everywhere():
    with small_models():
        pipeline = MfluxPipeline.load(str(dense("ideogram-4-fp8")))
        for recipe in ("gptq-w4a16-g64", "rtn-w8a16-g32"):
            with pytest.raises(
                RecipeError, match="the same bits everywhere, in groups of 64; use a recipe such as rtn"
            ):
                quantize_pipeline(pipeline, CALIBRATION, "rtn-w8a16-g64", recipe)
            with pytest.raises(RecipeError, match="the same bits everywhere"):
                plan_pipeline(pipeline, 1, "rtn-w8a16-g64", recipe)


@pytest.mark.mflux
@pytest.mark.slow
def test_a_folder_of_ours_is_read_again(tmp_path):
    folder = dense("ideogram-4-fp8")
    with small_models():
        pipeline = MfluxPipeline.load(str(folder))
        report = quantize_pipeline(pipeline, CALIBRATION[:1], "rtn-w8a8", steps=2, size=SIZE)
        picture = drawn(pipeline)
        save_pipeline(pipeline, report, tmp_path / "ours")
        again = load_pipeline(tmp_path / "ours")
    np.testing.assert_array_equal(drawn(again), picture)
