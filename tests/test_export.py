"""The verb: what it writes for each target, what it refuses, and that nothing is left behind when it does."""

import json
import os

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.errors import ArtifactError, ExportError
from mlxquant.files.checked import file_digest, read_json
from mlxquant.layers.linear import find_quantized
from mlxquant.layers.tree import get_module
from mlxquant.models.shapes.adapter import MMDiTShapes

from support.command_line import fail, succeed
from support.tiny_pictures import tiny_adapter

PROMPT = mq.Prompt(7, "a large red circle at left on white background")


@pytest.fixture(scope="module")
def tiny_model():
    return mq.Model(tiny_adapter())


@pytest.fixture(scope="module")
def calibration(tiny_model):
    return mq.calibrate(tiny_model, prompts=1, steps=2)


def quantized(tiny_model, calibration, recipe):
    return mq.quantize(tiny_model, calibration, recipe)


@pytest.fixture
def folder(tiny_model, calibration, tmp_path):
    return quantized(tiny_model, calibration, "rtn-w4a8").save(tmp_path / "q")


RECIPES = {  # and what of each only our layers can run
    "rtn-w4a16": "",
    "rtn-w4a8": "",
    "rtn-w7a8-g32": "7 bits",
    "rtn+smoothquant-w4a8": "a division of its input's channels",
    "rtn+rotation-w4a4": "a rotation of its input in blocks of",
    "rtn+svd4-w4a8": "a low-rank branch of rank 4",
    "rtn+softmax8-w4a8": "",
    "rtn-w4a8-token": "",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_mlx_runs_the_same_bit_for_bit(tiny_model, calibration, recipe, tmp_path):
    model = quantized(tiny_model, calibration, recipe)
    facts = mq.export(model, tmp_path / "out", "mlx")
    again = mq.load(tmp_path / "out")
    np.testing.assert_array_equal(again.images([PROMPT], steps=3), model.images([PROMPT], steps=3))
    model.save(tmp_path / "q")
    again.save(tmp_path / "again")
    for name in ("weights.safetensors", "model.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "q" / name).read_bytes()
    ours = [(int(note.split()[0]), note) for note in facts["notes"] if "only mlxquant runs" in note]
    assert facts["layers"] + sum(count for count, _ in ours) == len(model.layers)
    assert bool(ours) == bool(RECIPES[recipe])
    assert all(RECIPES[recipe] in note for _, note in ours)


@pytest.mark.parametrize("recipe", ["rtn-w4a16", "rtn-w4a8"])
def test_any_program_reads_the_plain_layers(tiny_model, calibration, recipe, tmp_path):
    """With nothing but MLX and config.json."""
    model = quantized(tiny_model, calibration, recipe)
    mq.export(model, tmp_path / "out", "mlx")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "mlxquant.safetensors").exists() == (recipe == "rtn-w4a8")
    theirs = MMDiTShapes.blank(config).module
    setting = config["quantization"]
    nn.quantize(theirs, class_predicate=lambda path, part: setting.get(path, False))
    theirs.load_weights(str(tmp_path / "out" / "model.safetensors"))
    x = mx.random.normal((2, 32), key=mx.random.key(0))
    for path, layer in find_quantized(model.adapter.module).items():
        other = get_module(theirs, path)
        np.testing.assert_allclose(np.array(other.scales)[:, 0], np.array(layer.grid().scales)[:, 0])
        layer.drop_activations()
        inputs = mx.tile(x, (1, layer.shape[1] // 32))
        np.testing.assert_allclose(np.array(other(inputs)), np.array(layer(inputs)), atol=3e-5)


def test_mlx_without_activation_scales(tiny_model, calibration, tmp_path):
    model = quantized(tiny_model, calibration, "rtn-w4a8")
    mq.export(model, tmp_path / "out", "mlx", drop_activations=True)
    again = mq.load(tmp_path / "out")
    assert all(layer.table is None for layer in again.layers.values())
    for layer in model.layers.values():
        layer.drop_activations()
    np.testing.assert_array_equal(again.images([PROMPT], steps=3), model.images([PROMPT], steps=3))


def test_a_damaged_export_is_refused(folder, tmp_path):
    mq.export(mq.load(folder), tmp_path / "out", "mlx")
    path = tmp_path / "out" / "mlxquant.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"mlxquant\.safetensors"):
        mq.load(tmp_path / "out")


def test_the_command_says_what_it_wrote(folder, tmp_path):
    facts, said = succeed("export", "--model", folder, "--target", "mlx", "--out", tmp_path / "out")
    assert facts["target"] == "mlx"
    assert facts["out"] == str(tmp_path / "out")
    files = [path for path in (tmp_path / "out").iterdir() if path.name != "export.json"]
    assert facts["bytes"] == sum(path.stat().st_size for path in files)
    assert 4 < facts["bits_per_weight"] < 16
    assert f"{facts['layers']} packed layers" in said
    record = read_json(tmp_path / "out" / "export.json", "export")
    assert record["recipe"]["name"] == "rtn-w4a8"
    assert record["files"] == {path.name: file_digest(path) for path in files}
    again, _ = succeed("export", "--model", folder, "--target", "mlx", "--out", tmp_path / "out", "--force")
    assert again == facts


def test_equal_exports_are_equal_bytes(folder, tmp_path):
    for name in ("a", "b"):
        succeed("export", "--model", folder, "--target", "mlx", "--out", tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mlx-lm", "mlx-lm runs language models, found QuantizedModel mmdit-shapes"),
        ("mflux", "mflux has no SD3"),
        ("diffusionkit", "DiffusionKit loads sd3-medium alone, found QuantizedModel mmdit-shapes"),
    ],
)
def test_a_target_that_has_no_such_model_says_so(folder, tmp_path, target, message):
    said = fail("export", "--model", folder, "--target", target, "--out", tmp_path / "out", code=1)
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["q"]


def test_folders_of_others_are_not_replaced(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    arguments = ["export", "--model", folder, "--target", "mlx", "--out", other]
    assert "pass --force" in fail(*arguments, code=1)
    assert "was not written by mlxquant" in fail(*arguments, "--force", code=1)
    assert (other / "thesis.txt").read_text() == "years of work"


def test_a_folder_of_another_target_is_replaced(tmp_path):
    """Only export.json says that it is ours."""
    module = nn.Sequential(nn.Linear(32, 32))
    out = tmp_path / "out"
    type(module).__module__, before = "mflux.model", type(module).__module__
    try:
        mq.export(module, out, "mflux")
        with pytest.raises(ArtifactError, match="exists"):
            mq.export(module, out, "mflux")
        mq.export(module, out, "mflux", component="vae", force=True)
    finally:
        type(module).__module__ = before
    assert sorted(os.listdir(out)) == ["export.json", "vae"]


def test_an_unquantized_model_has_nothing_to_tell(tiny_model, tmp_path):
    with pytest.raises(ExportError, match=r"writes what mlxquant\.quantize made, found Model mmdit-shapes"):
        mq.export(tiny_model, tmp_path / "out", "mlx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "gguf"}, "no target 'gguf'; expected one of mlx-lm, mlx, mflux, diffusionkit"),
        ({"target": "mlx", "dtype": "float16"}, "has its own dtypes"),
        ({"target": "mflux", "dtype": "int8"}, "no dtype 'int8'; expected one of float16, bfloat16, float32"),
        (
            {"target": "mlx"},
            "writes what mlxquant.quantize made, found a bare Linear; save a bare module with save_module",
        ),
        ({"target": "mlx-lm"}, "a bare Linear goes to mlx-lm with its config and its tokenizer"),
    ],
)
def test_calls_that_make_no_sense(tmp_path, arguments, message):
    with pytest.raises(ExportError, match=message):
        mq.export(nn.Linear(2, 2), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []
