"""References to models: names, hub ids, folders; and what is said where DiffusionKit is not installed."""

import subprocess
import sys

import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.models import catalog
from mlxquant.models.diffusionkit import package as diffusionkit

from support.command_line import fail
from support.hub_stand_in import LocalEntryNotFoundError, repositories

HUB = "argmaxinc/mlx-stable-diffusion-3-medium"


def test_names_hub_ids_and_folders(tmp_path):
    assert catalog.find_model("mmdit-shapes") == ("mmdit-shapes", "")
    assert catalog.find_model("sd3-medium") == ("sd3-medium", "")
    assert catalog.find_model(HUB) == ("sd3-medium", HUB)
    (tmp_path / "sd3_medium.safetensors").write_text("")
    assert catalog.find_model(str(tmp_path)) == ("sd3-medium", str(tmp_path))
    assert catalog.model_name(str(tmp_path)) == "sd3-medium"
    assert catalog.model_name(None) is None


def test_a_name_and_where_its_weights_are(tmp_path):
    assert catalog.find_model(f"pixart-alpha@{tmp_path}") == ("pixart-alpha", str(tmp_path))
    assert catalog.find_model("pixart-alpha@some/model") == ("pixart-alpha", "some/model")
    with pytest.raises(AdapterError, match=r"'no where' is neither a folder, nor a file, nor a hub id"):
        catalog.find_model("pixart-alpha@no where")
    with pytest.raises(AdapterError, match="unknown model 'nobody@some/model'"):
        catalog.find_model("nobody@some/model")


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    """Models that other tests have registered are none of this release's."""
    monkeypatch.setattr(catalog, "_registered", {})


FLUX, QWEN, ODD = "black-forest-labs/FLUX.1-dev", "mlx-community/Qwen3-0.6B-bf16", "someone/weights"
HELD = {
    FLUX: {"model_index.json": {"_class_name": "FluxPipeline"}},
    QWEN: {"config.json": {"model_type": "qwen3"}},
    ODD: {"README.md": ""},
}


def test_a_repository_is_asked_what_it_holds(monkeypatch, tmp_path):
    repositories(monkeypatch, tmp_path, HELD)
    assert catalog.find_model(QWEN) == ("mlx-lm", QWEN)
    runs = "This release runs mmdit-shapes, sd3-medium, .*gpt-python and language models of mlx-lm"
    with pytest.raises(AdapterError, match=rf"{FLUX} holds diffusers' FluxPipeline\. {runs}; .*quantize_linears"):
        catalog.find_model(FLUX)
    with pytest.raises(AdapterError, match=rf"{ODD} holds no model that tells its kind.*{runs}; check the hub id"):
        catalog.find_model(ODD)


def test_a_folder_of_another_pipeline_is_told_apart_too(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(AdapterError, match="holds diffusers' FluxPipeline"):
        catalog.find_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"model_index\.json: not JSON"):
        catalog.find_model(str(tmp_path))


def test_a_command_says_what_a_repository_is_or_that_it_could_not_be_asked(monkeypatch, tmp_path):
    command = ["quantize", "--model", FLUX, "--recipe", "rtn-w4a8", "--out", tmp_path / "q"]
    repositories(monkeypatch, tmp_path, HELD)
    assert "holds diffusers' FluxPipeline" in fail(*command)
    repositories(monkeypatch, tmp_path, {FLUX: LocalEntryNotFoundError("offline")})
    assert "could not be asked what it holds" in fail(*command)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("reference", ["sd9", "./none/here/at/all"])
def test_unknown_references_are_told_what_there_is(reference):
    with pytest.raises(AdapterError, match=f"unknown model '{reference}'.*mmdit-shapes.*pixart-sigma.*gpt-python"):
        catalog.find_model(reference)


def test_a_folder_without_weights_is_told_what_it_lacks(tmp_path):
    with pytest.raises(ArtifactError, match=r"model\.json.*sd3_medium\.safetensors"):
        catalog.find_model(str(tmp_path))


def test_without_diffusionkit_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "sd3_medium.safetensors").write_text("")
    monkeypatch.setitem(sys.modules, "diffusionkit", None)
    monkeypatch.setitem(sys.modules, "diffusionkit.mlx", None)
    diffusionkit.host.cache_clear()
    with pytest.raises(AdapterError, match=r"pip install 'mlxquant\[diffusionkit\]'"):
        diffusionkit.host()
    diffusionkit.host.cache_clear()


def test_importing_mlxquant_imports_neither_torch_nor_diffusionkit():
    heavy = ("torch", "diffusionkit", "transformers")
    code = (
        f"import mlxquant, mlxquant.models.diffusionkit.adapter, sys; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
