"""What DiffusionKit's own pipeline draws from a checkpoint that was exported for it."""

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.errors import ExportError
from mlxquant.exporters.diffusionkit import effective_weight
from mlxquant.layers.linear import find_quantized
from mlxquant.layers.tree import get_module, parameters
from mlxquant.models.diffusionkit.package import host

from support.command_line import fail, succeed

pytestmark = pytest.mark.diffusionkit
PROMPT = mq.Prompt(5, "a cat on a mat")


@pytest.fixture(scope="module")
def model(sd3_folder):
    return mq.load(f"diffusionkit:{sd3_folder}", size=64)


@pytest.fixture(scope="module")
def calibration(model):
    return mq.calibrate(model, prompts=1, steps=2)


@pytest.fixture
def draw(diffusionkit, tiny_host, random_sd3):
    """DiffusionKit's pipeline around a checkpoint, with everything but the transformer in float32, as we have it on the
    CPU.
    """

    def drawn(folder):
        pipe = diffusionkit.DiffusionPipeline(
            w16=True,
            shift=3.0,
            low_memory_mode=False,
            model_version=random_sd3.MMDIT,
            local_ckpt=str(folder / "sd3_medium.safetensors"),
        )
        for name in ("clip_l", "clip_g", "t5_encoder", "decoder", "encoder"):
            getattr(pipe, name).set_dtype(mx.float32)
        weights = {name: np.array(value.astype(mx.float32)) for name, value in parameters(pipe.mmdit).items()}
        image, _ = pipe.generate_image(
            PROMPT.text, num_steps=3, cfg_weight=4.0, latent_size=(8, 8), seed=PROMPT.seed, verbose=False
        )
        return np.array(image, np.int32), weights

    return drawn


def picture(model):
    return np.array(model.generate(PROMPT.text, seed=PROMPT.seed, steps=3, cfg=4.0), np.int32)


@pytest.mark.parametrize("recipe", ["rtn-w4a16", "rtn+rotation-w3a16", "rtn+svd4-w4a16"])
def test_the_picture_is_the_quantized_models(model, calibration, draw, recipe, tmp_path):
    quantized = mq.quantize(model, calibration, recipe)
    facts = mq.export(quantized, tmp_path / "out", "diffusionkit")
    theirs, weights = draw(tmp_path / "out")
    ours, plain = picture(quantized), picture(model)
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(ours - plain).max() > 20
    layers = find_quantized(quantized.adapter.module)
    for path, layer in layers.items():
        np.testing.assert_array_equal(
            weights[f"{path}.weight"], np.array(effective_weight(layer).astype(mx.float16)).astype(np.float32)
        )
    assert any(f"{len(layers)} quantized layers written as float16" in note for note in facts["notes"])
    assert facts["bits_per_weight"] == 16
    assert any(layer.rotation > 1 for layer in layers.values()) == ("rotation" in recipe)
    assert any(layer.branch is not None for layer in layers.values()) == ("svd" in recipe)


def test_an_unquantized_checkpoint_comes_back(sd3_folder, model, tmp_path):
    """Every tensor of the original, but for the bias of the keys, which DiffusionKit leaves out."""
    mq.export(model, tmp_path / "out", "diffusionkit")
    before, after = (mx.load(str(folder / "sd3_medium.safetensors")) for folder in (sd3_folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        one, other = np.array(value), np.array(after[name])
        if name.endswith("attn.qkv.bias"):
            (one, _, more), (other, none, others) = np.split(one, 3), np.split(other, 3)
            np.testing.assert_array_equal(more, others)
            assert not none.any()
        np.testing.assert_array_equal(one, other)


def test_activation_scales_are_left_out_when_that_is_asked_for(model, calibration, draw, tmp_path):
    quantized = mq.quantize(model, calibration, "rtn-w4a8")
    quantized.save(tmp_path / "q")
    arguments = ["export", "--model", tmp_path / "q", "--target", "diffusionkit", "--out", tmp_path / "out"]
    said = fail(*arguments, code=1)
    assert "has static activation scales (as have" in said
    assert "or pass --drop-activations" in said
    facts, _ = succeed(*arguments, "--drop-activations")
    assert facts["target"] == "diffusionkit"
    theirs, _ = draw(tmp_path / "out")
    for layer in quantized.layers.values():
        layer.drop_activations()
    assert np.abs(picture(quantized) - theirs).max() <= 2


def test_weights_beyond_float16_are_refused(model, calibration, tmp_path):
    quantized = mq.quantize(model, calibration, "rtn-w8a16")
    path, layer = next(iter(quantized.layers.items()))
    get_module(quantized.adapter.module, path).scales = layer.scales * 0 + 6e4
    with pytest.raises(ExportError, match=f"{path}.weight: holds values that float16 cannot"):
        mq.export(quantized, tmp_path / "out", "diffusionkit")


def test_its_loader_knows_packed_layers_of_two_other_models_alone():
    """The reason why weights are written as numbers: if this fails, DiffusionKit has learned more."""
    assert {name for name in host().model_io._MMDIT if "4bit" in name} == {
        "argmaxinc/mlx-FLUX.1-schnell-4bit-quantized",
        "argmaxinc/mlx-stable-diffusion-3.5-large-4bit-quantized",
    }
