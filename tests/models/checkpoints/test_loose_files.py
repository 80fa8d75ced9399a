"""Text encoders and autoencoders in files of their own near a single file: where they are found, by what, and what is
said of what cannot be used.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.models.checkpoints.open import open_source
from mlxquant.models.parts.clip import load_clip

from support import loose_files as loose
from support.hub_stand_in import RepositoryNotFoundError, repositories
from support.original_files import original_autoencoder
from support.sd3_transformers import LARGE, MEDIUM

CLIPS = ("text_encoder", "text_encoder_2")
ENCODERS = (*CLIPS, "text_encoder_3")
WIDE = {**MEDIUM, "attention_head_dim": 64, "num_attention_heads": 1, "caption_projection_dim": 64, **loose.READS}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("comfy")
    loose.write_comfyui(root)
    return root


@pytest.fixture
def models(written, tmp_path):
    shutil.copytree(written / "models", tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """A hub that refuses everything."""
    refused = RepositoryNotFoundError("401")
    kinds = ("3-medium-diffusers", "3.5-medium", "3.5-large")
    return repositories(
        monkeypatch, tmp_path / "hub", {f"stabilityai/stable-diffusion-{kind}": refused for kind in kinds}
    )


def opened(models, name="sd3.5_medium.safetensors", folder="checkpoints"):
    return open_source(str(models / folder / name))


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.array(found[name]), value, name)


def test_each_is_found_and_is_what_its_tensors_say(models, caplog, hub):
    source = opened(models)
    assert all(source.has(component) for component in ENCODERS)
    same(source.tensors("text_encoder"), {**loose.clip_l(), loose.PROJECTION: np.eye(loose.WIDTH)})
    same(source.tensors("text_encoder_2"), loose.clip_g())
    same(source.tensors("text_encoder_3"), loose.t5())
    small, large, t5 = map(source.config, ENCODERS)
    assert (small["num_hidden_layers"], small["hidden_act"], large["num_hidden_layers"]) == (12, "quick_gelu", 32)
    assert small["architectures"] == large["architectures"] == ["CLIPTextModelWithProjection"]
    assert (t5["d_model"], t5["num_layers"]) == (2 * loose.WIDTH, loose.T5["num_layers"])
    said = [record.getMessage() for record in caplog.records]
    for component, name in zip(ENCODERS, ("clip_l", "clip_g", "t5xxl_fp16"), strict=True):
        path = models / "text_encoders" / f"{name}.safetensors"
        assert sum(f"{component} (" in line and str(path) in line for line in said) == 1
    assert hub == []


@pytest.mark.parametrize(
    "place",
    [
        ".",  # beside the model
        "text_encoders",  # as the hub has it
        "../text_encoders",
        "../clip",
        "../clip/sd3",  # ordered by the user
        "../../text_encoders",  # of a model in a folder of its own
    ],
)
def test_where_they_may_lie(models, place):
    to = models / "checkpoints" / "mine" / place
    model = models / "checkpoints" / "mine" / "a.safetensors"
    model.parent.mkdir()
    (models / "checkpoints" / "sd3.5_medium.safetensors").rename(model)
    (models / "text_encoders").rename(models / "away")
    to.mkdir(parents=True, exist_ok=True)
    for path in (models / "away").iterdir():
        path.rename(to / path.name)
    assert all(open_source(str(model)).tensors(component) for component in ENCODERS)


def test_a_relative_path_is_walked_up_from_too(models, monkeypatch):
    monkeypatch.chdir(models / "checkpoints")
    assert open_source("sd3.5_medium.safetensors").tensors("text_encoder_2")


def test_names_do_not_say_what_they_are(models):
    """They say which of several is meant."""
    folder = models / "text_encoders"
    (folder / "clip_l.safetensors").rename(folder / "x.safetensors")
    (folder / "clip_g.safetensors").rename(folder / "clip_l.safetensors")
    (folder / "x.safetensors").rename(folder / "clip_g.safetensors")
    source = opened(models)
    assert [source.config(component)["num_hidden_layers"] for component in CLIPS] == [12, 32]


def test_of_several_that_with_the_usual_name_is_taken_and_the_others_are_named(models, caplog):
    loose.write(models / "text_encoders" / "ViT-L-14-finetuned.safetensors", loose.clip_l(seed=9))
    same(opened(models).tensors("text_encoder"), {**loose.clip_l(), loose.PROJECTION: np.eye(loose.WIDTH)})
    assert "clip_l.safetensors, and not" in caplog.text
    assert "ViT-L-14-finetuned.safetensors" in caplog.text


@pytest.mark.parametrize("prefix", ["transformer.", "text_encoders.clip_g.transformer."])
def test_a_prefix_and_what_else_is_in_such_files(models, prefix):
    more = {"logit_scale": mx.ones(()), f"{prefix}text_model.embeddings.position_ids": mx.arange(77)[None]}
    arrays = {prefix + name: mx.array(value) for name, value in loose.clip_g().items()}
    mx.save_safetensors(str(models / "text_encoders" / "clip_g.safetensors"), {**arrays, **more})
    source = opened(models)
    assert source.config("text_encoder_2")["num_hidden_layers"] == 32
    load_clip(source, "text_encoder_2", mx.float32)  # refuses what it has no place for


def test_a_projection_that_is_turned(models):
    """As files of ComfyUI's CLIPSave once had it."""
    tensors = loose.clip_g()
    turned = {**tensors, "text_projection": tensors[loose.PROJECTION].T}
    del turned[loose.PROJECTION]
    loose.write(models / "text_encoders" / "clip_g.safetensors", turned)
    same(opened(models).tensors("text_encoder_2"), tensors)


def test_clip_l_is_not_projected_whatever_its_file_has(models):
    tensors = {**loose.clip_l(), loose.PROJECTION: np.ones((loose.WIDTH, loose.WIDTH), np.float32)}
    loose.write(models / "text_encoders" / "clip_l.safetensors", tensors)
    found = opened(models).tensors("text_encoder")[loose.PROJECTION]
    np.testing.assert_array_equal(np.array(found), np.eye(loose.WIDTH))


def test_clip_g_without_a_projection_is_an_error(models):
    tensors = {name: value for name, value in loose.clip_g().items() if name != loose.PROJECTION}
    loose.write(models / "text_encoders" / "clip_g.safetensors", tensors)
    with pytest.raises(ArtifactError, match=r"clip_g.safetensors: CLIP-G without 'text_projection.weight'; get it"):
        opened(models).tensors("text_encoder_2")


def umt5():
    name = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    return loose.t5() | {name.format(1): loose.t5()[name.format(0)]}


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("t5xxl_a", umt5),
        ("t5xxl_b", lambda: loose.t5(config={**loose.T5, "d_model": 96})),
        ("t5xxl_c", lambda: {name.replace("wi_0", "wi"): value for name, value in loose.t5().items()}),
        ("clip_l_of_sd2", lambda: loose.parts.clip_tensors({**loose.CLIP_L, "num_hidden_layers": 24})),
        ("whole", lambda: {f"text.{k}": v for k, v in loose.t5().items()} | {"unet.a": np.ones(2)}),
    ],
)  # fmt: skip
def test_other_encoders_are_not_taken(models, name, tensors):
    folder = models / "text_encoders"
    shutil.rmtree(folder)
    loose.write(folder / f"{name}.safetensors", tensors())
    source = opened(models)
    for component in ENCODERS:
        with pytest.raises(ArtifactError, match=f"has no {component}, nor"):
            source.tensors(component)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_file_of_eight_bits_is_left_out_for_one_of_sixteen(models, caplog, dtype):
    folder = models / "text_encoders"
    (folder / "t5xxl_fp16.safetensors").rename(folder / "mine.safetensors")
    path = loose.write_coded(folder / "t5xxl_fp8_e4m3fn.safetensors", loose.t5(), dtype)
    same(opened(models).tensors("text_encoder_3"), loose.t5())
    assert f"{path}: " in caplog.text
    assert f"is stored as {dtype}, so the file is quantized already; left out" in caplog.text


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_file_of_eight_bits_alone_is_an_error_with_the_command(models, dtype):
    folder = models / "text_encoders"
    (folder / "t5xxl_fp16.safetensors").unlink()
    path = loose.write_coded(folder / "t5xxl_fp8_e4m3fn.safetensors", loose.t5(), dtype)
    source = opened(models)
    assert source.has("text_encoder_3"), "it is there, so it is not drawn without it"
    with pytest.raises(ArtifactError) as caught:
        source.tensors("text_encoder_3")
    for part in (
        f"{path}: ",
        "is quantized already",
        "hf download stabilityai/stable-diffusion-3.5-medium text_encoders/t5xxl_fp16.safetensors --local-dir",
        "or move this file away",
    ):
        assert part in str(caught.value)
    assert "…" not in str(caught.value)


def test_both_clips_without_t5_draw_without_it(models):
    (models / "text_encoders" / "t5xxl_fp16.safetensors").unlink()
    assert [opened(models).has(component) for component in ENCODERS] == [True, True, False]
    (models / "text_encoders" / "clip_g.safetensors").unlink()
    assert opened(models).has("text_encoder_3"), "one CLIP is no choice"


def test_a_file_with_text_encoders_is_given_no_others(models):
    """ComfyUI's loader of checkpoints takes them from the file, too."""
    held = {f"text_encoders.clip_l.transformer.{name}": value for name, value in loose.clip_l(seed=7).items()}
    held |= {f"text_encoders.clip_g.transformer.{name}": value for name, value in loose.clip_g(seed=8).items()}
    path = models / "checkpoints" / "sd3.5_medium.safetensors"
    arrays = mx.load(str(path))
    loose.write(models / "checkpoints" / "incl_clips.safetensors", {**arrays, **held})
    source = opened(models, "incl_clips.safetensors")
    assert [source.has(component) for component in ENCODERS] == [True, True, False]
    same(source.tensors("text_encoder_2"), loose.clip_g(seed=8))


def test_folders_of_diffusers_beside_the_file_come_first(models):
    tensors = {"text_model.final_layer_norm.weight": np.zeros(3, np.float32)}
    loose.write(models / "checkpoints" / "text_encoder" / "model.safetensors", tensors)
    assert opened(models).tensors("text_encoder").keys() == tensors.keys()


@pytest.mark.parametrize(
    ("said", "repository"),
    [
        (WIDE, "stabilityai/stable-diffusion-3-medium"),
        ({**LARGE, **loose.READS}, "stabilityai/stable-diffusion-3.5-large"),
        (loose.SAID, "stabilityai/stable-diffusion-3.5-medium"),
    ],
)
def test_what_is_missing_is_one_error_with_the_folders_and_the_command(models, monkeypatch, said, repository):
    monkeypatch.chdir(models)  # a message has so many characters, and paths of tests may be long
    (models / "text_encoders" / "clip_g.safetensors").unlink()
    (models / "clip").mkdir()
    loose.write_model(models / "checkpoints" / "b.safetensors", said)
    path = Path("checkpoints", "b.safetensors")
    with pytest.raises(ArtifactError) as caught:
        open_source(str(path)).tensors("text_encoder_2")
    for part in (
        f"{path} has no text_encoder_2, nor a folder text_encoder_2 beside it",
        "nor CLIP-G there or in ../text_encoders, ../clip",
        f"https://huggingface.co/{repository}",
        f"'hf download {repository} text_encoders/clip_g.safetensors --local-dir checkpoints'",
    ):
        assert part in str(caught.value)
    assert "…" not in str(caught.value)


def test_without_any_such_folder_the_error_names_those_that_would_be_looked_in(models):
    shutil.rmtree(models / "text_encoders")
    with pytest.raises(ArtifactError, match="nor CLIP-L there or text_encoders or clip above: accept the licence"):
        opened(models).tensors("text_encoder")


def test_a_damaged_file_is_left_out_and_named(models, caplog):
    path = models / "text_encoders" / "clip_g.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    (models / "text_encoders" / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="nor CLIP-G there"):
        opened(models).tensors("text_encoder_2")
    assert f"{path}: not a safetensors file, or a damaged one" in caplog.text
    assert "other" not in caplog.text


def autoencoder(channels):
    return {
        name.removeprefix("first_stage_model."): value
        for name, value in original_autoencoder(channels, (32, 32, 32, 32), seed=5).items()
    }


@pytest.mark.parametrize("folder", ["diffusion_models", "."])
def test_an_autoencoder_by_its_name(models, folder):
    """By its tensors it could be FLUX's."""
    arrays = mx.load(str(models / "checkpoints" / "sd3.5_medium.safetensors"))
    drawing = {
        name.removeprefix("model.diffusion_model."): value
        for name, value in arrays.items()
        if name.startswith("model.diffusion_model.")
    }
    loose.write(models / folder / "sd3.5_medium.safetensors", drawing)
    loose.write(models / "vae" / "ae.safetensors", autoencoder(4))
    with pytest.raises(ArtifactError, match="has no vae, nor a folder vae beside it, nor the autoencoder there or in"):
        opened(models, folder=folder).tensors("vae")
    loose.write(models / "vae" / "sd3_vae.safetensors", autoencoder(8))
    with pytest.raises(ArtifactError, match="has no vae"):
        opened(models, folder=folder).tensors("vae")
    loose.write(models / "vae" / "sd3_vae.safetensors", autoencoder(4))
    source = opened(models, folder=folder)
    expected = original_autoencoder(4, (32, 32, 32, 32), seed=5)
    found = source.tensors("vae")
    np.testing.assert_array_equal(
        np.array(found["decoder.conv_in.weight"]), np.array(expected["first_stage_model.decoder.conv_in.weight"])
    )
    assert (source.config("vae")["latent_channels"], source.config("vae")["shift_factor"]) == (4, 0.0609)


def test_tokenizers_of_comfyui_itself(models, hub):
    """CLIP's two are one, but for what they pad with."""
    source = opened(models)
    with pytest.raises(ArtifactError, match=r"sd3.5_medium.safetensors has no tokenizer, nor a folder tokenizer"):
        source.file("tokenizer", "vocab.json")
    for name, file in {"sd1_tokenizer": "vocab.json", "text_encoders/t5_tokenizer": "tokenizer.json"}.items():
        (models.parent / "comfy" / name).mkdir(parents=True)
        (models.parent / "comfy" / name / file).write_text("{}")
    source = opened(models)
    clip = models.parent / "comfy" / "sd1_tokenizer"
    assert source.file("tokenizer", "vocab.json") == source.file("tokenizer_2", "vocab.json") == clip / "vocab.json"
    assert source.finds("tokenizer_3", "tokenizer.json").parent == models.parent / "comfy/text_encoders/t5_tokenizer"
    assert source.finds("tokenizer", "special_tokens_map.json") is None
    assert json.loads(source.finds("tokenizer_2", "special_tokens_map.json").read_text()) == {"pad_token": "!"}
    with pytest.raises(ArtifactError, match=r"sd1_tokenizer has no merges.txt; it is ComfyUI's own: update ComfyUI"):
        source.file("tokenizer", "merges.txt")
    (models / "checkpoints" / "tokenizer").mkdir()
    (models / "checkpoints" / "tokenizer" / "vocab.json").write_text("[]")
    assert opened(models).file("tokenizer", "vocab.json").parent == models / "checkpoints" / "tokenizer"
