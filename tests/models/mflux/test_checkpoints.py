"""The small pipelines that tests of mflux stand on: built, saved and loaded by mflux itself, and drawn with."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support.mflux_checkpoints import CHECKPOINTS, FAMILIES, draw, load, saved, small_models
from support.mflux_hub import as_on_the_hub
from support.mflux_models import mflux

pytestmark = [pytest.mark.mflux, pytest.mark.slow]

HUB = [name for name in FAMILIES if name not in ("anima-turbo", "iris-3b")]  # those are put together of several


@pytest.fixture(autouse=True)
def small():
    with small_models():
        yield


def parts(name, pipeline):
    """All arrays of a pipeline, by component and path."""
    found = {}
    for component in CHECKPOINTS[name].components():
        module = getattr(pipeline, component.model_attr or component.name)
        found |= {f"{component.name}.{path}": array for path, array in tree_flatten(module.parameters())}
    return found


def assert_same(name, pipeline, other):
    """All arrays are equal; gains of a convolution's kind may have lost axes of length one."""
    mine, theirs = parts(name, pipeline), parts(name, other)
    assert mine.keys() == theirs.keys()
    for path, array in mine.items():
        assert array.dtype == theirs[path].dtype, path
        assert mx.array_equal(array.flatten(), theirs[path].flatten()), path


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_was_saved_is_loaded_and_draws_the_same_twice(name, tmp_path):
    built = saved(name, tmp_path)
    loaded = load(name, tmp_path)
    assert_same(name, loaded, built)
    picture = draw(built)
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 10
    np.testing.assert_array_equal(draw(loaded), picture)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_seed_decide_what_is_drawn(name, tmp_path):
    pipeline = saved(name, tmp_path)
    picture = draw(pipeline)
    assert (draw(pipeline, prompt="a blue square") != picture).mean() > 0.1
    assert (draw(pipeline, seed=4) != picture).mean() > 0.1


@pytest.mark.parametrize("name", [*HUB, "flux3-image-klein-base"])
def test_the_layout_of_the_hub_is_loaded_as_the_same_model(name, tmp_path):
    built = as_on_the_hub(name, tmp_path)
    loaded = load(name, tmp_path)
    assert loaded.bits is None
    assert_same(name, loaded, built)


@pytest.mark.parametrize("name", FAMILIES)
def test_mflux_quantizes_them_itself(name, tmp_path):
    quantized = saved(name, tmp_path, quantize=4)
    loaded = load(name, tmp_path)
    assert loaded.bits == 4
    assert any(path.endswith(".scales") for path in parts(name, loaded))
    assert_same(name, loaded, quantized)
    assert draw(loaded).std() > 10


def test_a_fine_tune_has_the_name_and_the_blocks_of_its_own_checkpoint(tmp_path):
    pipeline = saved("lite", tmp_path)
    assert len(pipeline.transformer.transformer_blocks) == 8
    assert len(pipeline.transformer.single_transformer_blocks) == 38
    info = json.loads((tmp_path / "mflux_model.json").read_text())
    assert (info["model_name"], info["base_model"]) == ("Freepik/flux.1-lite-8B", "dev")


def test_another_precision_may_be_asked_for(tmp_path):
    with small_models(mx.bfloat16):
        saved("z-image-turbo", tmp_path)
        config = mflux("models.common.config.model_config.ModelConfig")
        assert config.precision == mx.bfloat16
    assert config.precision == mx.float32
