"""Inside a quantized model, against the models themselves run by hand."""

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.evaluation.layer_report import comparable, covered, layer_report
from mlxquant.grids.tables import ActivationTable
from mlxquant.layers.tree import tapped
from mlxquant.progress import silent


@pytest.fixture(scope="module")
def models():
    from support.tiny_pictures import tiny_adapter

    model = mq.Model(tiny_adapter())
    calib = mq.calibrate(model, prompts=2, steps=3)
    return model, mq.quantize(model, calib, "rtn-w4a8"), calib


@pytest.fixture(scope="module")
def report(models):
    model, quantized, calib = models
    return layer_report(model, quantized, calib, silent)


def test_every_layer_and_stage_has_every_noise_level(models, report):
    model, quantized, calib = models
    np.testing.assert_allclose(report["sigma"], np.sort(calib.sigmas), rtol=1e-6)
    assert report["stages"]["name"] == [stage.name for stage in model.adapter.stages]
    assert {row["path"] for row in report["layers"]} == set(quantized.layers)
    stages = [report["stages"]["name"].index(row["stage"]) for row in report["layers"]]
    assert stages == sorted(stages)
    for row in report["layers"]:
        layer = quantized.layers[row["path"]]
        assert len(row["error"]) == len(row["range"]["low"]) == 3
        assert sum(row["codes"]["count"]) == np.prod(layer.shape)
        assert row["role"] == model.adapter.role(row["path"])
        assert (row["table"] is None) == (layer.table is None) == (row["activation"] == 16)
    assert report["decisions"] == quantized.facts["stages"]


def test_errors_and_ranges_are_what_the_models_do(models, report):
    model, quantized, calib = models
    sigmas, states = calib.batches(model.adapter, 2)
    row = next(row for row in report["layers"] if row["path"].endswith("1.image_transformer_block.mlp.fc2"))
    index = 1
    state, inputs = states[index], {}
    for name, one in (("exact", model), ("own", quantized)):
        with tapped(one.adapter.module, [row["path"]], lambda path, x, name=name: inputs.__setitem__(name, x)):
            inputs[f"{name} out"] = one.adapter.run(state, sigmas[index])["velocity"]
            mx.eval(inputs)
    place = report["sigma"].index(float(np.float32(sigmas[index])))
    velocity = [np.array(inputs[f"{name} out"], np.float64) for name in ("exact", "own")]
    assert report["stages"]["error"][-1][place] == pytest.approx(
        np.linalg.norm(velocity[1] - velocity[0]) / np.linalg.norm(velocity[0]), rel=1e-4
    )
    x = np.array(inputs["own"])
    assert row["range"]["low"][place] == pytest.approx(x.min())
    assert row["range"]["high"][place] == pytest.approx(x.max())
    linear = model.adapter.layers()[row["path"]]
    exact = np.array(inputs["exact"], np.float64) @ np.array(linear.weight, np.float64).T + np.array(linear.bias)
    with quantized.adapter.clock.at(sigmas[index]):
        own = np.array(quantized.layers[row["path"]](inputs["own"]))
    assert row["error"][place] == pytest.approx(np.linalg.norm(own - exact) / np.linalg.norm(exact), rel=1e-4)
    table = quantized.layers[row["path"]].table
    entry = list(table.sigma).index(np.float32(sigmas[index]))
    high = (table.shift[entry] + (2 ** (int(table.bits[entry]) - 1) - 1) * table.step[entry]).max()
    assert row["table"]["high"][entry] == pytest.approx(high, rel=1e-6)


def test_codes_are_counted_from_the_smallest(models, report):
    _, quantized, _ = models
    row = report["layers"][3]
    layer = quantized.layers[row["path"]]
    values = layer.codes().astype(int) - layer.format.zero_code
    for code in (-2, 0, 3):
        assert row["codes"]["count"][code - row["codes"]["first"]] == (values == code).sum()


def test_a_table_covers_what_its_codes_stand_for():
    table = ActivationTable(
        np.array([0.5, 1.0], np.float32),
        np.array([0.1, 0.1], np.float32),
        np.array([[1.0], [1.0]], np.float32),
        np.array([4, 16]),
    )
    low, high, step = covered(table, table.sigma)
    np.testing.assert_allclose(low[:, 0], [1 - 0.8, -np.inf])
    np.testing.assert_allclose(high[:, 0], [1 + 0.7, np.inf], rtol=1e-6)
    np.testing.assert_allclose(step[:, 0], 0.1)


def test_layers_that_absorbed_a_transform_are_not_compared(models):
    model, quantized, _ = models
    assert comparable(model.adapter, quantized) == set(quantized.layers)
    changed = mq.QuantizedModel(quantized.clone(), quantized.facts)
    path = next(iter(changed.layers))
    layer = changed.layers[path]
    layer.bias = layer.bias / 2
    assert comparable(model.adapter, changed) == set(quantized.layers) - {path}
