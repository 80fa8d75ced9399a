"""Networks over time from calibration to a picture: saved with their layers, resumed, read at any number of steps."""

import numpy as np
import pytest

import mlxquant as mq
from mlxquant.errors import RecipeError
from mlxquant.exporters.mlx import structure
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.plain import obstacles
from mlxquant.methods.inputs import time_networks

from support.killed_sweep import killed_after

OTHERS = np.linspace(1, 0.3, 7, dtype=np.float32)


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    monkeypatch.setattr(time_networks, "ITERATIONS", 3)
    monkeypatch.setattr(time_networks, "LOOK", 1)


def arrays(model):
    return {name: np.array(value) for name, value in model._arrays().items()}


def tables(model):
    return {path: layer.table for path, layer in model.layers.items() if layer.table is not None}


@pytest.mark.parametrize("method", ["tdq", "logsnr", "tdq-ridge", "logsnr-ridge"])
def test_a_model_that_was_calibrated_at_few_steps_has_entries_for_others_from_its_networks(tiny, tmp_path, method):
    made = mq.quantize(tiny, mq.calibrate(tiny, prompts=1, steps=3), f"rtn+{method}-w8a8")
    made.save(tmp_path / "q")
    loaded = mq.load(tmp_path / "q")
    assert tables(made)
    assert tables(made).keys() == tables(loaded).keys()
    for path, table in tables(loaded).items():
        assert table.network.time == ("log-snr" if method.startswith("logsnr") else "timestep")
        np.testing.assert_allclose(table.at(OTHERS).step, table.network.entries(OTHERS)[0], rtol=1e-4)
        for found, wanted in zip(table.at(OTHERS), tables(made)[path].at(OTHERS), strict=True):
            np.testing.assert_array_equal(found, wanted)
    prompts = [mq.Prompt(1, "a large red circle at left on white background")]
    np.testing.assert_array_equal(loaded.images(prompts, steps=5), made.images(prompts, steps=5))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_sweep_ends_with_the_same_networks(tiny, tmp_path, stage):
    calib = mq.calibrate(tiny, prompts=1, steps=3)
    whole = mq.quantize(tiny, calib, "rtn+tdq-w8a8")
    with killed_after(stage):
        mq.quantize(tiny, calib, "rtn+tdq-w8a8", work=tmp_path)
    resumed = arrays(mq.quantize(tiny, calib, "rtn+tdq-w8a8", work=tmp_path))
    assert sum(name.endswith("act_network") for name in resumed) == len(tables(whole))
    assert resumed.keys() == arrays(whole).keys()
    for name, value in arrays(whole).items():
        np.testing.assert_array_equal(resumed[name], value)


def test_exporters_leave_a_network_out_with_its_table(tiny):
    made = mq.quantize(tiny, mq.calibrate(tiny, prompts=1, steps=3), "rtn+logsnr-ridge-w8a8")
    layer = next(layer for layer in made.layers.values() if layer.table is not None)
    without = {name: value for name, value in layer.facts.items() if name != "network"}
    assert obstacles(layer.facts) == obstacles(without)
    left = structure(layer.facts, drop_activations=True)
    assert "network" not in left
    assert not any(name.startswith("act_") for name in QuantizedLinear.blank(left, None).parameters())


def test_another_table_takes_the_network_away(tiny):
    made = mq.quantize(tiny, mq.calibrate(tiny, prompts=1, steps=3), "rtn+tdq-ridge-w8a8")
    layer = next(layer for layer in made.layers.values() if layer.table is not None)
    columns = [getattr(layer.table, name) for name in ("sigma", "step", "shift", "bits")]
    layer.set_activations(type(layer.table)(*columns), made.adapter.clock)
    assert layer.table.network is None
    assert "network" not in layer.facts
    assert "act_network" not in layer
    with pytest.raises(RecipeError, match="network over time"):
        QuantizedLinear.blank({**layer.facts, "network": {"time": "noon", "widths": [12, 2]}}, None)
