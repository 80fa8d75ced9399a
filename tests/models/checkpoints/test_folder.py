"""A folder of the diffusers layout: which file is read, and what is said of one that cannot be."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.models.checkpoints.folder import DiffusersFolder
from mlxquant.sampling.scheduler_config import scheduler_from_config

from support.hub_stand_in import repositories

INDEX = {"_class_name": "Some", "unet": ["diffusers", "UNet"], "vae": ["diffusers", "VAE"], "safety": [None, None]}


def written(folder, name, **values):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), {key: mx.array(value) for key, value in values.items()})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    written(tmp_path, "unet/diffusion_pytorch_model.safetensors", a=[1.0])
    (tmp_path / "unet" / "config.json").write_text('{"width": 3}')
    return tmp_path


def shards(folder, index, **where):
    (folder / "unet" / index).write_text(json.dumps({"weight_map": where}))


def values(folder):
    return {name: value.item() for name, value in DiffusersFolder(str(folder)).tensors("unet").items()}


def test_what_is_in_it(folder):
    source = DiffusersFolder(str(folder))
    assert (source.pipeline, source.place) == ("Some", str(folder))
    assert [source.has(name) for name in ("unet", "vae", "safety", "other")] == [True, True, False, False]
    assert (source.config("unet"), values(folder)) == ({"width": 3}, {"a": 1.0})
    assert source.finds("unet", "none.txt") is None


def test_an_infinite_number_in_a_config_is_text(folder):
    """As diffusers writes it into scheduler_config.json, which is no JSON then."""
    (folder / "scheduler").mkdir()
    said = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": float("-inf")}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    found = DiffusersFolder(str(folder)).config("scheduler")
    assert found["lambda_min_clipped"] == "-Infinity"
    assert scheduler_from_config(found) == scheduler_from_config(said)


def test_full_precision_comes_before_a_variant(folder):
    written(folder, "unet/diffusion_pytorch_model.fp16.safetensors", a=[2.0])
    assert values(folder) == {"a": 1.0}
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert values(folder) == {"a": 2.0}


@pytest.mark.parametrize("index", ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"])
def test_shards(folder, index):
    written(folder, "unet/one.safetensors", a=[3.0], left=[9.0])
    written(folder, "unet/two.safetensors", b=[4.0])
    shards(folder, index, a="one.safetensors", b="two.safetensors")
    assert values(folder) == {"a": 1.0}, "there is full precision"
    shards(folder, "diffusion_pytorch_model.safetensors.index.json", b="two.safetensors")
    assert values(folder) == {"b": 4.0}
    for name in ("safetensors", "safetensors.index.json"):
        (folder / "unet" / f"diffusion_pytorch_model.{name}").unlink()
    assert values(folder) == {"a": 3.0, "b": 4.0}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "has no model_index.json: expected a folder in the layout of"),
        (lambda f: (f / "model_index.json").write_text("{"), "not JSON, or damaged"),
        (lambda f: (f / "model_index.json").write_text('{"unet": [1]}'), "unet"),
        (lambda f: (f / "unet/config.json").write_text("[]"), "config.json: says nothing; expected a JSON object with"),
        (lambda f: (f / "unet/config.json").write_text("{}"), "config.json: says nothing; expected a JSON object with"),
        (lambda f: (f / "unet/config.json").unlink(), "has no unet/config.json; get it with 'hf download HUB_ID"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x"), "not a safetensors file"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "unet/model.bin"), "but model.bin"),
        (
            lambda f: shards(f, "diffusion_pytorch_model.safetensors.index.json", a="../one.safetensors"),
            "not inside its folder",
        ),
        (
            lambda f: shards(f, "diffusion_pytorch_model.safetensors.index.json", a="one.safetensors"),
            "has no unet/one.safetensors",
        ),
        (
            lambda f: shards(
                f, "diffusion_pytorch_model.safetensors.index.json", c="diffusion_pytorch_model.safetensors"
            ),
            "says that c is in it",
        ),
    ],
)
def test_what_cannot_be_read_is_an_error_about_it(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        source = DiffusersFolder(str(folder))
        source.tensors("unet"), source.config("unet")
    assert str(folder) in str(caught.value)


def test_a_component_that_is_not_there(folder):
    """One command brings all of it."""
    with pytest.raises(
        ArtifactError, match=r"has no vae/config\.json; get it with 'hf download HUB_ID --include 'vae/\*'"
    ):
        DiffusersFolder(str(folder)).config("vae")
    with pytest.raises(ArtifactError, match=r"vae has no weights as safetensors \(no folder .*vae\); get them with"):
        DiffusersFolder(str(folder)).tensors("vae")


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("F8_E4M3", r"a is stored in 8 bits, so the file is quantized already \(fp8\)"),
        ("F8_E5M2", "a tensor is stored as F8_E5M2, which MLX does not read: the file is quantized already, or for"),
    ],
)
def test_numbers_of_eight_bits_are_refused(folder, dtype, message):
    """MLX reads F8_E4M3 as whole numbers, and F8_E5M2 not at all."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    header = json.dumps({"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(np.uint64(len(header)).tobytes() + header + bytes(4))
    with pytest.raises(ArtifactError, match=message):
        DiffusersFolder(str(folder)).tensors("unet")


def test_of_the_hub_what_is_needed_is_fetched(tmp_path, monkeypatch):
    held = {"some/model": {"model_index.json": INDEX, "unet/config.json": {"width": 5}}}
    asked = repositories(monkeypatch, tmp_path, held)
    source = DiffusersFolder("some/model")
    assert (source.config("unet"), asked) == ({"width": 5}, ["model_index.json", "unet/config.json"])
    with pytest.raises(ArtifactError, match="get them with 'hf download some/model --include 'unet/"):
        source.tensors("unet")
    repositories(monkeypatch, tmp_path, held, cached=["some/model"])
    assert DiffusersFolder("some/model").config("unet") == {"width": 5}
