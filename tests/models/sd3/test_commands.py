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
from mlxquant.models.sd3.names import to_diffusers

from support.command_line import fail, succeed
from support.original_files import original_autoencoder, original_transformer
from support.sd3_folder import TEXT, write_text, write_whole
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


def test_a_tokenizer_that_is_missing_is_named_with_the_command(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sd3")
    (tmp_path / "sd3" / "tokenizer" / "merges.txt").unlink()
    said = fail(*drawing(tmp_path / "sd3", tmp_path / "a.png"), "--size", 64)
    assert "has no tokenizer/merges.txt; get it with 'hf download HUB_ID --include 'tokenizer/merges.txt'" in said
