"""A saved model whose facts somebody has changed, its checksum made right: refused before anything is read or built."""

import re

import pytest

import mlxquant as mq
from mlxquant.contents.reader import read_contents
from mlxquant.errors import ArtifactError, MlxQuantError
from mlxquant.files.checked import read_json, write_json
from mlxquant.models.shapes.adapter import MMDiTShapes

from support.tiny_pictures import tiny_adapter

LAYER = "multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj"


@pytest.fixture(scope="module")
def quantized():
    model = mq.Model(tiny_adapter())
    return mq.quantize(model, mq.calibrate(model, prompts=1, steps=2), "rtn-w4a8")


def changed(model, folder, change):
    """A saved model whose facts somebody has changed, its checksum made right afterwards."""
    model.save(folder)
    facts = read_json(folder / "model.json", "quantized-model")
    change(facts)
    write_json(
        folder / "model.json", "quantized-model", {k: v for k, v in facts.items() if k not in ("kind", "version")}
    )


@pytest.mark.parametrize("name", ["/etc/weights.safetensors", "../weights.safetensors", "a/../../b", "..\\b", ""])
def test_files_outside_of_the_folder_are_refused_and_not_read(quantized, tmp_path, name, monkeypatch):
    def change(facts):
        facts["files"] = {name: facts["files"]["weights.safetensors"]}

    changed(quantized, tmp_path / "q", change)
    monkeypatch.setattr("mlxquant.api.model.read_tensors", lambda *a, **k: pytest.fail("it was read"))
    for read in (mq.load, read_contents):
        with pytest.raises(ArtifactError, match=r"model\.json: .* which is not inside its folder"):
            read(tmp_path / "q")


@pytest.mark.parametrize("value", [2**31, 2**40, 2**63, -1, 0.5, None, "8", True, [8]])
@pytest.mark.parametrize("place", [("shape", 0), ("shape", 1), ("table", 0), ("table", 1), ("rank",), ("rotation",)])
def test_sizes_that_are_none_are_refused_before_anything_is_built(quantized, tmp_path, place, value, monkeypatch):
    """MLX says std::bad_cast to what is no int32."""

    def change(facts):
        inner = facts["layers"][LAYER]
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value

    changed(quantized, tmp_path / "q", change)
    monkeypatch.setattr(MMDiTShapes, "blank", lambda description: pytest.fail("something was built"))
    where = f"layers.{LAYER}.{place[0]}" + "".join(f"[{key}]" for key in place[1:])
    with pytest.raises(ArtifactError, match=re.escape(f"incomplete or foreign, {where} is ")):
        mq.load(tmp_path / "q")


@pytest.mark.parametrize(
    ("place", "value"), [("shape", [32, 2**31 - 1]), ("rank", 2**31 - 1), ("table", [2**31 - 1, 1])]
)
def test_sizes_that_arrays_do_not_have_are_refused(quantized, tmp_path, place, value):
    changed(quantized, tmp_path / "q", lambda facts: facts["layers"][LAYER].update({place: value}))
    with pytest.raises(ArtifactError, match=r"does not fit the model|has shape .*, the model expects"):
        mq.load(tmp_path / "q")


@pytest.mark.parametrize("changes", [{"depth_multimodal": 10**6}, {"hidden_size": 2**30}, {"num_heads": 0}, {"x": 1}])
def test_models_of_impossible_sizes_are_not_built(quantized, tmp_path, changes):
    changed(quantized, tmp_path / "q", lambda facts: facts["model"]["config"].update(changes))
    with pytest.raises(MlxQuantError, match=r"model\.config\.\w+ is|unknown keys"):
        mq.load(tmp_path / "q")
