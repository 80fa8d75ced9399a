"""Stable Diffusion from what people have on disk: folders, halves, shards, single files; and what is said of others."""

import mlxquant as mq  # before mlx

# isort: split
import json
import logging
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.layers.tree import parameters
from mlxquant.models import catalog
from mlxquant.models.checkpoints.open import open_source
from mlxquant.models.unet.adapter import StableDiffusion
from mlxquant.models.unet.config import HUB_IDS

from support import parts
from support.command_line import succeed
from support.original_unet import CONFIG, write_sd1_file
from support.tiny_unet import CONFIGS, random_unet, small_adapter, waves, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sd")
    write_folder(place)
    return place


def same(adapter, model):
    """Whether a host has the weights of a UNet."""
    ours, expected = (dict(parameters(one)) for one in (adapter.module, model))
    return ours.keys() == expected.keys() and all(mx.array_equal(ours[name], expected[name]) for name in ours)


def test_a_folder_is_known_by_its_pipeline(folder):
    assert catalog.find_model(str(folder)) == ("sd15", str(folder))
    assert [catalog.find_model(name) for name in HUB_IDS] == [("sd15", name) for name in HUB_IDS]
    adapter = mq.load(str(folder)).adapter
    assert type(adapter) is StableDiffusion
    assert same(adapter, random_unet(CONFIGS["1.5"]))
    assert (adapter.size, adapter.latent_shape, adapter.dtype) == ((64, 64), (8, 8, 4), mx.float32)
    assert adapter.place == str(folder)


def test_half_precision_as_a_variant_and_in_shards(tmp_path):
    """The weights stay as they are stored; what is computed is float32."""
    model = write_folder(tmp_path, dtype=mx.float16)
    whole = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    arrays = mx.load(str(whole))
    names = sorted(arrays)
    shards = {"a.fp16.safetensors": names[::2], "b.fp16.safetensors": names[1::2]}
    for name, some in shards.items():
        mx.save_safetensors(str(tmp_path / "unet" / name), {key: arrays[key] for key in some})
    index = {"weight_map": {key: name for name, some in shards.items() for key in some}}
    parts.write_json(tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json", index)
    del arrays
    whole.unlink()
    adapter = mq.load(str(tmp_path)).adapter
    assert adapter.dtype == mx.float16
    model.set_dtype(mx.float16)
    assert same(adapter, model)
    adapter.components.text = waves(32)
    state = adapter.state(mx.random.normal((1, 8, 8, 4)), adapter.encode(["a"]), 0.5)
    assert adapter.run(state, 0.5)["velocity"].dtype == mx.float32


def test_a_single_file(tmp_path):
    model = write_sd1_file(tmp_path / "any.safetensors")
    adapter = mq.load(str(tmp_path / "any.safetensors")).adapter
    assert type(adapter) is StableDiffusion
    assert same(adapter, model)
    assert adapter.size == (64 * 2, 64 * 2)  # of an autoencoder that halves once
    assert adapter.scheduler == small_adapter().scheduler


def test_pictures_are_not_checked_and_that_is_said(tmp_path, caplog):
    write_folder(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    parts.write_json(tmp_path / "model_index.json", index | checker)
    with caplog.at_level(logging.INFO, "mlxquant"):
        mq.load(str(tmp_path))
    assert f"{tmp_path}: its safety_checker is not run" in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_index.json": {"_class_name": "StableDiffusionXLPipeline"}}, AdapterError, "StableDiffusionXLPipeline"),
        ({"unet/config.json": {"addition_embed_type": "text_time"}}, AdapterError, "unet/config.json: .*text_time"),
        ({"unet/config.json": {"in_channels": 9}}, AdapterError, "inpainting"),
        ({"unet/config.json": {"cross_attention_dim": 40}}, ArtifactError, "shape"),
        ({"unet/config.json": {"layers_per_block": 2}}, ArtifactError, "lack .* tensors"),
        (
            {"vae/config.json": {"latent_channels": 16}},
            ArtifactError,
            "latents of 16 channels, and the network reads 4",
        ),
        ({"vae/config.json": {"block_out_channels": []}}, ArtifactError, "vae/config.json: block_out_channels"),
        ({"scheduler/scheduler_config.json": {"_class_name": "UniPCMultistepScheduler"}}, AdapterError, "UniPC"),
        ({"scheduler/scheduler_config.json": {"skip_prk_steps": False}}, AdapterError, "skip_prk_steps"),
    ],
)
def test_what_is_not_supported_is_said_with_its_file(tmp_path, change, error, message):
    write_folder(tmp_path)
    for name, said in change.items():
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(error, match=message) as caught:
        StableDiffusion.pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("component", ["unet", "vae", "scheduler"])
def test_a_missing_component_is_named_with_the_command(tmp_path, component):
    write_folder(tmp_path)
    shutil.rmtree(tmp_path / component)
    with pytest.raises(ArtifactError, match=rf"has no {component}/\w+\.json; get it with 'hf download .*{component}"):
        mq.load(str(tmp_path))


@pytest.mark.images
def test_text_of_another_width_is_refused(tmp_path):
    write_folder(tmp_path, {**CONFIGS["1.5"], "cross_attention_dim": 40})
    adapter = mq.load(str(tmp_path)).adapter
    with pytest.raises(ArtifactError, match="its text encoder writes 32 channels, and the UNet reads 40"):
        adapter.encode(["the cat"])


@pytest.mark.images
def test_a_folder_and_a_single_file_draw_the_same(tmp_path):
    """From the same weights; what the file lacks lies beside it."""
    folder, file = tmp_path / "folder", tmp_path / "beside" / "file.safetensors"
    said = {**CONFIG, "sample_size": 8, "cross_attention_dim": 64}
    clip = {**parts.CLIP_L, "hidden_size": 64, "num_attention_heads": 1}
    file.parent.mkdir()
    write_sd1_file(file, said, parts.clip_tensors(clip))
    parts.write_clip_tokenizer(file.parent)
    write_folder(folder, said)
    parts.write_clip(folder, "text_encoder", clip)
    source = open_source(str(file))
    parts.write_component(folder, "vae", source.config("vae"), source.tensors("vae"), "diffusion_pytorch_model")
    pictures = []
    for place in (folder, file):
        adapter = mq.load(str(place)).adapter
        adapter.resize(32)
        pictures.append(adapter.decode(adapter.generate(["the cat"], [3], 3)))
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].shape == (1, 32, 32, 3)
    assert pictures[0].std() > 0.01


@pytest.mark.images
@pytest.mark.parametrize("command", ["calibrate-snr", "quantize-qronos-4blocks", "quantize"])
def test_commands(tmp_path, command):
    """From a folder of the hub's layout to a picture of the quantized model."""
    hub, out, picture = tmp_path / "hub", tmp_path / "model", tmp_path / "a.png"
    write_folder(hub, CONFIGS["few"])
    asked = {
        "calibrate-snr": ("--abits", 8, "--wbits", 8, "--blocks", 1, "--save-path", out),
        "quantize-qronos-4blocks": ("--save-path", out),
        "quantize": ("--recipe", "rtn-w4a8", "--out", out),
    }[command]
    succeed(command, "--model", hub, "--num-prompts", 2, "--steps", 2, *asked)
    drawn = ("--prompt", "the cat", "--steps", 3, "--output", picture)
    succeed("generate", "--model", out, *drawn)
    assert picture.stat().st_size > 1000


@pytest.mark.images
def test_the_six_steps(tmp_path):
    """They round the Linears of its blocks, of which some have none; convolutions stay as they are."""
    hub, calib, weights = tmp_path / "hub", tmp_path / "calib", tmp_path / "adaround"
    write_folder(hub, CONFIGS["few"])
    of, some = ("--model", hub), ("--calib-dir", calib, "--num-images", 2)
    succeed("generate-calibration-data", *of, *some, "--num-steps", 3)
    succeed("cache-adaround-data", *of, *some, "--stride", 1)
    succeed("collect-layer-activations", *of, *some, "--stride", 1)
    stats, tables = calib / "activations" / "layer_statistics.json", calib / "activations" / "quant_config.json"
    succeed("analyze-activations", *of, "--stats", stats, "--output", tables)
    learned = ("--cache-dir", calib / "adaround_cache", "--output-dir", weights, "--iters", 4)
    facts, said = succeed("adaround-optimize", *of, *learned)
    assert facts["blocks"] == 10
    assert " exact " in said
    drawn = (
        "--prompt",
        "the cat",
        "--num-steps",
        3,
        "--output-image",
        tmp_path / "a.png",
        "--save",
        tmp_path / "model",
    )
    succeed("load-adaround-model", *of, "--adaround-output", weights, "--quant-config", tables, *drawn)
    quantized = mq.QuantizedModel.load(tmp_path / "model")
    assert set(quantized.layers) == set(mq.load(str(hub)).adapter.block_linears())
