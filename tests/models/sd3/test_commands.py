"""A whole tiny Stable Diffusion 3.5 by the commands, text encoders and all, without torch."""

import json
import shutil
import subprocess
import sys

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxquant.layers.tree import parameters
from mlxquant.models.checkpoints.open import open_source
from mlxquant.models.sd3.names import to_diffusers

from support import loose_files, parts
from support.command_line import fail, succeed
from support.original_files import original_autoencoder, original_transformer
from support.sd3_folder import TEXT, write_json, write_text, write_weights, write_whole
from support.sd3_transformers import DUAL, random_transformer

pytestmark = pytest.mark.images
SMALL = ("--steps", 2, "--num-prompts", 2, "--size", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_whole(tmp_path_factory.mktemp("sd3"), DUAL)


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "q"
    facts, _ = succeed("quantize", "--model", folder, "--recipe", "gptq-w4a8", "--out", out, *SMALL)
    assert facts["bits_per_weight"] < 12
    return out


def drawing(model, output):
    return ("generate", "--model", model, "--prompt", "a cat on the mat", "--steps", 2, "--output", output)


def test_it_is_quantized_and_draws_beside_full_precision(folder, quantized, tmp_path):
    facts, _ = succeed(*drawing(quantized, tmp_path / "a.png"), "--compare", folder)
    assert 5 < facts["psnr_db"] < 60
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 2 * 64


def test_nothing_imports_torch_or_transformers(quantized, tmp_path):
    """They are as if they were not installed."""
    arguments = [str(part) for part in drawing(quantized, tmp_path / "a.png")]
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'diffusers')))\n"
        "from mlxquant.commandline.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["output"] == str(tmp_path / "a.png")


@pytest.fixture
def single(tmp_path):
    """A single file, with the text encoders and tokenizers in folders beside it."""
    model = random_transformer({**DUAL, **TEXT})
    tensors = original_transformer(to_diffusers(parameters(model), model.config))
    tensors |= original_autoencoder(DUAL["in_channels"], (32, 32, 32, 32))
    mx.save_safetensors(str(tmp_path / "sd3.5_any.safetensors"), tensors)
    write_text(tmp_path)
    (tmp_path / "model_index.json").unlink()
    return tmp_path / "sd3.5_any.safetensors"


def test_a_single_file_with_text_encoders_beside_it_draws(single, tmp_path):
    succeed(*drawing(single, tmp_path / "a.png"), "--size", 64)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (64, 64)
        assert np.asarray(picture).std() > 0


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("tokenizer_2", "sd3.5_any.safetensors has no tokenizer_2, nor a folder tokenizer_2 beside it"),
        ("text_encoder", "sd3.5_any.safetensors has no text_encoder, nor a folder text_encoder beside it"),
        ("tokenizer_3/spiece.model", "has no tokenizer_3/spiece.model; get it with"),
        ("text_encoder_2/model.safetensors", "text_encoder_2 has no weights as safetensors; get them with"),
    ],
)
def test_what_is_missing_beside_it_is_said(single, tmp_path, monkeypatch, gone, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = fail(*drawing(single, tmp_path / "a.png"), "--size", 64)
    assert message in said
    assert "hf download stabilityai/stable-diffusion-3.5-medium" in said


@pytest.fixture
def comfyui(tmp_path):
    """A model without text encoders in ComfyUI's folders, which has everything else."""
    model = loose_files.write_comfyui(tmp_path / "ComfyUI")
    own = tmp_path / "ComfyUI" / "comfy"
    parts.write_clip_tokenizer(own, "sd1_tokenizer")
    parts.write_t5_tokenizer(own / "text_encoders", "t5_tokenizer")
    return model


def test_a_model_in_comfyui_draws_what_the_same_draws_in_diffusers_layout(comfyui, tmp_path, monkeypatch):
    """Its text encoders are files of their own, and the hub cannot be reached."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    succeed(*drawing(comfyui, tmp_path / "a.png"), "--size", 64)
    folder = write_whole(tmp_path / "whole", loose_files.SAID, text=loose_files.READS)
    clip_l = {**loose_files.clip_l(), loose_files.PROJECTION: np.eye(loose_files.WIDTH, dtype=np.float32)}
    parts.write_component(folder, "text_encoder", loose_files.CLIP_L, clip_l)
    parts.write_component(folder, "text_encoder_2", loose_files.CLIP_G, loose_files.clip_g())
    parts.write_component(folder, "text_encoder_3", loose_files.T5, loose_files.t5())
    source = open_source(str(comfyui))
    write_json(folder / "vae" / "config.json", source.config("vae"))
    write_weights(folder / "vae", source.tensors("vae"))
    succeed(*drawing(folder, tmp_path / "b.png"), "--size", 64)
    with Image.open(tmp_path / "a.png") as ours, Image.open(tmp_path / "b.png") as theirs:
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_text_encoder_of_eight_bits_is_refused(comfyui, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = comfyui.parent.parent / "text_encoders"
    (folder / "t5xxl_fp16.safetensors").unlink()
    loose_files.write_coded(folder / "t5xxl_fp8_e4m3fn.safetensors", loose_files.t5())
    said = fail(*drawing(comfyui, tmp_path / "a.png"), "--size", 64)
    assert "t5xxl_fp8_e4m3fn.safetensors: " in said
    assert "hf download stabilityai/stable-diffusion-3.5-medium text_encoders/t5xxl_fp16.safetensors" in said


def test_a_tokenizer_that_is_missing_is_named_with_the_command(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sd3")
    (tmp_path / "sd3" / "tokenizer" / "merges.txt").unlink()
    said = fail(*drawing(tmp_path / "sd3", tmp_path / "a.png"), "--size", 64)
    assert "has no tokenizer/merges.txt; get it with 'hf download HUB_ID --include 'tokenizer/merges.txt'" in said
