"""Single files of Stable Diffusion 1: what comes out under diffusers' names."""

from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.models.checkpoints.open import open_source
from mlxquant.models.checkpoints.sd1_file import SD1_FILE
from mlxquant.models.unet.config import UNetConfig

from support.original_unet import CONFIG, DEEP, original_unet, write_sd1_file
from support.tiny_unet import in_torch, random_unet

FILES = {"flat": CONFIG, "deep": DEEP}


@pytest.mark.parametrize("kind", FILES)
def test_a_unet_comes_out_as_it_went_in(tmp_path, kind):
    path = tmp_path / "any.safetensors"
    model = write_sd1_file(path, FILES[kind])
    source = open_source(str(path))
    assert source.pipeline == "StableDiffusionPipeline"
    assert UNetConfig.from_dict(source.config("unet")) == UNetConfig.from_dict(FILES[kind])
    found, expected = source.tensors("unet"), in_torch(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.array(found[name]), np.array(value), name)


@pytest.mark.diffusers
@pytest.mark.parametrize("kind", FILES)
def test_a_unet_is_what_diffusers_reads_of_it(kind):
    torch, utils = import_module("torch"), import_module("diffusers.loaders.single_file_utils")
    file = original_unet(in_torch(random_unet(FILES[kind])), FILES[kind])
    ours = SD1_FILE.tensors["unet"](file)
    theirs = utils.convert_ldm_unet_checkpoint(
        {name: torch.from_numpy(np.array(value)) for name, value in file.items()}, SD1_FILE.configs["unet"](ours)
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(np.array(ours[name]), value.numpy(), name)


def test_what_stands_around_the_unet(tmp_path):
    path = tmp_path / "a.safetensors"
    words = {f"text_model.{name}": mx.ones(shape) for name, shape in CLIP.items()}
    write_sd1_file(path, clip=words)
    source = open_source(str(path))
    assert all(source.has(name) for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))
    assert not source.has("transformer")
    assert source.config("vae")["scaling_factor"] == 0.18215
    assert source.config("vae")["use_quant_conv"]
    assert source.config("text_encoder")["hidden_act"] == "quick_gelu"
    assert source.config("text_encoder")["architectures"] == ["CLIPTextModel"]
    assert source.tensors("text_encoder").keys() == words.keys()
    assert source.config("scheduler")["_class_name"] == "PNDMScheduler"


CLIP = {
    "embeddings.token_embedding.weight": (100, 64),
    "embeddings.position_embedding.weight": (77, 64),
    "encoder.layers.0.mlp.fc1.weight": (128, 64),
}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"cond_stage_model.model.ln_final.weight": mx.ones(3)}, "no single file of Stable Diffusion 1"),
        ({"model.diffusion_model.label_emb.0.0.weight": mx.ones(3)}, "no single file of Stable Diffusion 1"),
        ({"model.diffusion_model.warp.weight": mx.ones(3)}, "the unet .*warp.weight is no part of the UNet of Stable"),
        (
            {f"model.diffusion_model.middle_block.1.{name}.weight": mx.ones((64, 64)) for name in ("proj_in",)},
            "the unet .*Stable Diffusion 2",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, more, message):
    write_sd1_file(tmp_path / "a.safetensors", **more)
    with pytest.raises(ArtifactError, match=message):
        open_source(str(tmp_path / "a.safetensors")).tensors("unet")
