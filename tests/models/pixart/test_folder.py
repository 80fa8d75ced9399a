"""PixArt from a folder: what is read of it, and one clear error about what cannot be."""

import json

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.layers.tree import parameters
from mlxquant.models.pixart.adapter import PixArtAlpha, PixArtSigma
from mlxquant.models.pixart.config import ALPHA

from support.pixart import SMALL, small_network, write_drawing

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return write_drawing(tmp_path)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    """Other tensors in the place of the transformer's."""
    arrays = mx.load(str(folder / WEIGHTS))
    mx.eval(arrays)
    mx.save_safetensors(str(folder / WEIGHTS), change(arrays))


def test_weights_are_in_their_places(folder):
    adapter = mq.load(folder).adapter
    wanted = parameters(small_network(SMALL))
    found = parameters(adapter.module)
    assert set(found) == set(wanted)
    for name, value in found.items():
        np.testing.assert_array_equal(np.array(value), np.array(wanted[name]), err_msg=name)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_weights_keep_their_precision_also_in_a_twin(tmp_path, name):
    model = mq.load(write_drawing(tmp_path, dtype=getattr(mx, name)))
    for adapter in (model.adapter, model.adapter.twin(), PixArtAlpha.described(model.adapter.describe())):
        assert {value.dtype for value in parameters(adapter.module).values()} == {getattr(mx, name)}
    text = {"tokens": mx.ones((1, 3, 20)), "mask": mx.ones((1, 3), mx.bool_)}
    state = {"latent": mx.ones((1, 8, 8, 4)), "t": mx.array([7.0]), **text}
    assert model.adapter.run(state, 0.5)["velocity"].dtype == mx.float32


def test_what_older_folders_also_have_is_not_read(folder):
    change(folder / "transformer" / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    more = {"caption_projection.y_embedding": mx.zeros((120, 20)), "pos_embed.pos_embed": mx.zeros((1, 16, 24))}
    rewrite(folder, lambda arrays: arrays | more)
    assert set(parameters(mq.load(folder).adapter.module)) == set(parameters(small_network(SMALL)))


def test_the_usual_places(monkeypatch):
    asked = []

    def remember(components):
        asked.append(components.place)
        raise ArtifactError("no network")

    monkeypatch.setattr("mlxquant.models.latent.Components.source", property(remember))
    for kind, place in ((PixArtAlpha, ""), (PixArtAlpha, ALPHA[1]), (PixArtSigma, "")):
        with pytest.raises(ArtifactError, match="no network"):
            kind.pretrained(place)
    assert asked == [
        "PixArt-alpha/PixArt-XL-2-1024-MS",
        "PixArt-alpha/PixArt-XL-2-512x512",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    ]


def spoiled(folder, name):
    """Make the folder one that cannot be run; returns the error that says so, and a part of its words."""
    transformer, scheduler = folder / "transformer", folder / "scheduler" / "scheduler_config.json"
    if name == "option":
        change(transformer / "config.json", norm_type="ada_norm_zero")
        return AdapterError, "transformer/config.json: norm_type 'ada_norm_zero' is not supported"
    if name == "another size":
        change(transformer / "config.json", caption_channels=24)
        return ArtifactError, r"caption_projection.linear_1.weight has shape \(24, 20\), and \(24, 24\) by config.json"
    if name == "a tensor":
        rewrite(folder, lambda arrays: {k: v for k, v in arrays.items() if k != "proj_out.bias"})
        return ArtifactError, "transformer lack 1 of .* tensors, such as proj_out.bias"
    if name == "weights":
        (folder / WEIGHTS).rename(transformer / "diffusion_pytorch_model.bin")
        return ArtifactError, "transformer has no weights as safetensors, but diffusion_pytorch_model.bin; get them"
    if name == "scheduler":
        change(scheduler, algorithm_type="dpmsolver")
        return AdapterError, "algorithm_type is 'dpmsolver', expected one of 'dpmsolver\\+\\+'"
    if name == "a vae of nothing":
        (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
        return ArtifactError, "vae/config.json: it has no 'block_out_channels'"
    if name == "no vae":
        (folder / "vae" / "config.json").unlink()
        return ArtifactError, "has no vae/config.json; get it with 'hf download"
    change(folder / "model_index.json", _class_name="PixArtSigmaPipeline")
    return AdapterError, "is of diffusers' PixArtSigmaPipeline, and pixart-alpha of PixArtAlphaPipeline"


@pytest.mark.parametrize(
    "name",
    ["option", "another size", "a tensor", "weights", "scheduler", "a vae of nothing", "no vae", "another pipeline"],
)
def test_what_cannot_be_run_is_one_clear_error(folder, name):
    kind, message = spoiled(folder, name)
    with pytest.raises(kind, match=message) as caught:
        PixArtAlpha.pretrained(str(folder))
    assert "\n" not in str(caught.value)


def test_a_missing_text_encoder_is_named_when_it_is_needed(folder):
    with pytest.raises(ArtifactError, match=r"has no tokenizer/spiece\.model; get it with 'hf download"):
        mq.load(folder).adapter.encode(["a cat"])
