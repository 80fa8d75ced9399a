"""The host of Stable Diffusion 3 and 3.5: its contract, where its weights come from, and what it saves."""

import json
import shutil

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.layers.tree import parameters
from mlxquant.models import catalog
from mlxquant.models.sd3.adapter import SD3Components, SD3Medium, SD35Large, SD35LargeTurbo, SD35Medium
from mlxquant.sampling.schedulers import FlowEuler

from support.adapter_contract import AdapterContract
from support.command_line import fail, succeed
from support.original_files import write_sd3_file
from support.sd3_folder import SCHEDULER, stub_text, write_drawing
from support.sd3_transformers import DUAL, LARGE, MEDIUM

KINDS = {"sd3-medium": (SD3Medium, MEDIUM), "sd3.5-medium": (SD35Medium, DUAL), "sd3.5-large": (SD35Large, LARGE)}
SIZE = 64


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A folder of each kind in the layout of diffusers, without text encoders."""
    folder = tmp_path_factory.mktemp(request.param)
    write_drawing(folder, KINDS[request.param][1])
    return folder


def loaded(folder, size=SIZE):
    model = mq.load(folder, size=size)
    model.adapter.components.text = stub_text
    return model


class Contract(AdapterContract):
    NAME = ""

    @pytest.fixture(scope="class")
    @classmethod
    def adapter(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("sd3")
        write_drawing(folder, KINDS[cls.NAME][1])
        return loaded(folder).adapter

    @classmethod
    def make_adapter(cls):
        raise AssertionError("the fixture above makes it")

    def whole(self, adapter, latent, conditioning, t):
        return adapter.module(latent, conditioning["tokens"], conditioning["pooled"], t)


class TestMedium(Contract):
    NAME = "sd3-medium"


class TestMedium35(Contract):
    NAME = "sd3.5-medium"


class TestLarge35(Contract):
    NAME = "sd3.5-large"


def test_the_config_says_which_it_is(folder, request):
    kind, _ = KINDS[request.node.callspec.params["folder"]]
    assert catalog.find_model(str(folder)) == (kind.name, str(folder))
    assert type(mq.load(folder).adapter) is kind
    others = [one for one in (SD3Medium, SD35Medium, SD35Large) if one is not kind]
    for other in others:
        with pytest.raises(ArtifactError, match=rf"its transformer is not {other.name}'s.*pass it as --model, without"):
            other.pretrained(str(folder))


def test_turbo_goes_by_its_name(tmp_path):
    write_drawing(tmp_path, LARGE)
    turbo = SD35LargeTurbo.pretrained(str(tmp_path))
    assert (turbo.steps, turbo.cfg, turbo.name) == (4, 1.0, "sd3.5-large-turbo")
    assert catalog.find_model(SD35LargeTurbo.hub_ids[0]) == ("sd3.5-large-turbo", SD35LargeTurbo.hub_ids[0])
    assert catalog.find_model(str(tmp_path))[0] == "sd3.5-large"


def test_a_single_file_is_the_folder(tmp_path):
    write_drawing(tmp_path / "folder", DUAL)
    write_sd3_file(tmp_path / "anything.safetensors", DUAL)
    one, other = mq.load(tmp_path / "folder").adapter, mq.load(tmp_path / "anything.safetensors").adapter
    assert (one.name, one.fingerprint) == (other.name, other.fingerprint)
    assert other.place == str(tmp_path / "anything.safetensors")
    assert other.scheduler == one.scheduler == FlowEuler(3.0)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_weights_keep_their_precision_and_it_computes_in_float32(tmp_path, dtype):
    write_drawing(tmp_path, DUAL, dtype)
    adapter = loaded(tmp_path).adapter
    assert {value.dtype for value in parameters(adapter.module).values()} == {dtype}
    noise = mx.random.normal((1, *adapter.latent_shape), key=mx.random.key(0))
    found = adapter.velocity(noise, adapter.encode(["a"]), 0.5)
    assert found.dtype == mx.float32
    again = type(adapter).described(json.loads(json.dumps(adapter.describe())))
    assert {value.dtype for value in parameters(again.module).values()} == {dtype}


def test_one_tensor_of_another_precision_does_not_make_the_model_larger(tmp_path):
    write_drawing(tmp_path, DUAL, mx.float16)
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    arrays = mx.load(str(path))
    arrays["proj_out.bias"] = arrays["proj_out.bias"].astype(mx.float32)
    mx.eval(arrays)
    path.unlink()
    mx.save_safetensors(str(path), arrays)
    assert {value.dtype for value in parameters(loaded(tmp_path).adapter.module).values()} == {mx.float16}


def test_a_scheduler_of_its_own_is_kept(tmp_path):
    write_drawing(tmp_path, MEDIUM, scheduler={**SCHEDULER, "shift": 2.0})
    adapter = loaded(tmp_path).adapter
    assert adapter.scheduler == FlowEuler(2.0)
    again = SD3Medium.described(json.loads(json.dumps(adapter.describe())))
    assert again.scheduler == adapter.twin().scheduler == FlowEuler(2.0)


def test_a_quantized_model_is_saved_and_loaded_and_finds_its_folder(tmp_path):
    write_drawing(tmp_path / "sd3", LARGE)
    model = loaded(tmp_path / "sd3")
    quantized = mq.quantize(model, mq.calibrate(model, prompts=2, steps=2), "rtn-w4a8")
    quantized.save(tmp_path / "q")
    stated = json.loads((tmp_path / "q" / "model.json").read_text())["model"]
    assert (stated["name"], stated["place"]) == ("sd3.5-large", "./../sd3")
    again = mq.load(tmp_path / "q")
    again.adapter.components.text = stub_text
    expected = np.array(quantized.generate("a cat", steps=2))
    np.testing.assert_array_equal(np.array(again.generate("a cat", steps=2)), expected)
    shutil.move(tmp_path / "sd3", tmp_path / "moved")
    with pytest.raises(ArtifactError, match=r"sd3: no such folder or file\. .*autoencoder are expected there"):
        mq.load(tmp_path / "q").generate("a cat", steps=1)


def test_what_0_2_0_saved_is_read_as_it_was(tmp_path):
    """It had DiffusionKit's modules: no biases of keys, the exact GELU, float16."""
    said = {
        "config": {"num_heads": 2, "depth_multimodal": 2, "hidden_size": 32, "mlp_ratio": 4, "vae_latent_dim": 4,
                   "patch_size": 2, "max_latent_resolution": 8, "pooled_text_embed_dim": 16,
                   "token_level_text_embed_dim": 24, "frequency_embed_dim": 16, "max_period": 10000,
                   "layer_norm_eps": 1e-6, "use_qk_norm": False},
        "size": 64,
    }  # fmt: skip
    adapter = catalog.adapter_class("sd3-medium").described(said)
    names = parameters(adapter.module)
    assert {value.dtype for value in names.values()} == {mx.float16}
    assert not [name for name in names if name.endswith("k_proj.bias")]
    assert (adapter.config.gelu, adapter.scheduler, adapter.size) == ("exact", FlowEuler(3.0), (64, 64))
    assert adapter.sampler is None, "the usual one, as calibrations of then say"


@pytest.mark.parametrize("size", [24, 8 * 2 * 12 + 16])
def test_sizes_that_it_has_no_positions_for(tmp_path, size):
    write_drawing(tmp_path, MEDIUM)
    with pytest.raises(AdapterError, match=f"multiple of 16 pixels, at most 192; {size} is none"):
        mq.load(tmp_path, size=size)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "transformer" / "config.json").unlink(),
            "has no transformer/config.json; get it with",
        ),
        (lambda f: shutil.rmtree(f / "transformer"), "has no transformer/config.json"),
        (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler/scheduler_config.json; get it"),
        (lambda f: (f / "vae" / "config.json").unlink(), "has no vae/config.json; get it with 'hf download"),
        (
            lambda f: (f / "transformer" / "config.json").write_text(
                (f / "transformer" / "config.json").read_text().replace('"num_layers": 3', '"num_layers": 4')
            ),
            "the transformer: does not fit the model: missing",
        ),
    ],
)
def test_a_missing_component_is_named(tmp_path, spoil, message):
    """Before anything is drawn."""
    write_drawing(tmp_path, MEDIUM)
    spoil(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        loaded(tmp_path).generate("a", steps=1)


def changed(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"block_out_channels": [8, 8, 16]}, r"block_out_channels \[8, 8, 16\] do not go with"),
        (
            {"latent_channels": 16},
            "its autoencoder has latents of 16 channels, and the network reads 4; one of the two",
        ),
    ],
)
def test_an_autoencoder_of_another_model_is_refused(tmp_path, monkeypatch, entries, message):
    """Before the first step."""
    write_drawing(tmp_path, MEDIUM)
    changed(tmp_path / "vae" / "config.json", **entries)
    monkeypatch.setattr(SD3Medium, "velocity", lambda *arguments: pytest.fail("it has begun"))
    with pytest.raises(ArtifactError, match=message):
        loaded(tmp_path).generate("a", steps=1)


def test_a_scheduler_of_another_family_is_refused(tmp_path):
    write_drawing(tmp_path, MEDIUM)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "PNDMScheduler", "skip_prk_steps": True}))
    with pytest.raises(AdapterError, match=r"predicts a flow, and its scheduler_config\.json .PNDMScheduler. is"):
        loaded(tmp_path)


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "PixArtAlphaPipeline"])
def test_a_folder_of_another_pipeline_is_refused_by_that(tmp_path, pipeline):
    write_drawing(tmp_path, MEDIUM)
    changed(tmp_path / "model_index.json", _class_name=pipeline)
    with pytest.raises(AdapterError, match=f"is of diffusers' {pipeline}, and sd3-medium of StableDiff"):
        SD3Medium.pretrained(str(tmp_path))


def test_the_command_draws_from_a_picture(tmp_path, monkeypatch):
    """As the function does; without much strength the picture stays what it was."""
    monkeypatch.setattr(SD3Components, "_encode", lambda self, prompts: stub_text(prompts))
    write_drawing(tmp_path / "sd3", MEDIUM)
    Image.new("RGB", (48, 96), "red").save(tmp_path / "red.png")
    drawing = ("--model", tmp_path / "sd3", "--prompt", "a cat", "--steps", 5, "--seed", 3, "--size", "96x64")
    into = ("--output", tmp_path / "a.png")
    succeed("generate", *drawing, "--image", tmp_path / "red.png", "--strength", 0.4, *into)
    model = mq.load(tmp_path / "sd3", size=(96, 64))
    begin = Image.new("RGB", (96, 64), "red")
    expected = np.asarray(model.generate("a cat", 3, 5, image=begin, strength=0.4), np.int32)
    assert np.abs(np.asarray(Image.open(tmp_path / "a.png"), np.int32) - expected).max() <= 1
    coded = model.decoded(model.adapter.latents(np.asarray(begin, np.float32)[None] / 255))[0] * 255
    little, much = (
        np.abs(np.asarray(model.generate("a cat", 3, 20, image=begin, strength=share), np.float32) - coded).mean()
        for share in (0.05, 1.0)
    )
    assert little < much
    seen = []
    monkeypatch.setattr(type(model.adapter), "velocity", lambda self, latent, *rest: seen.append(1) or latent * 0)
    model.generate("a cat", 3, 10, 1.0, image=begin, strength=0.35)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strength", 0.5], "--strength means nothing without --image"),
        (["--image", "a.png", "--compare", "sd3-medium"], "--compare draws from noise"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    write_drawing(tmp_path, MEDIUM)
    assert message in fail("generate", "--model", tmp_path, "--prompt", "a", *options)


def test_a_model_without_an_encoder_says_so():
    with pytest.raises(AdapterError, match="mmdit-shapes draws from noise alone"):
        mq.load("mmdit-shapes").generate("a red circle", image=Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(("strength", "side"), [(0.0, 8), (1.5, 8), (0.5, 4)])
def test_an_impossible_image_is_refused(tmp_path, strength, side):
    write_drawing(tmp_path, MEDIUM)
    adapter = loaded(tmp_path).adapter
    with pytest.raises(AdapterError, match=r"expected \[1, 8, 8, 4\], and a strength above 0 and at most 1"):
        adapter.generate(["a"], [1], 2, image=mx.zeros((1, side, side, 4)), strength=strength)


def test_turbo_of_a_folder_is_named(tmp_path):
    write_drawing(tmp_path, LARGE)
    adapter = mq.load(f"sd3.5-large-turbo@{tmp_path}").adapter
    assert (adapter.name, adapter.steps, adapter.place) == ("sd3.5-large-turbo", 4, str(tmp_path))
