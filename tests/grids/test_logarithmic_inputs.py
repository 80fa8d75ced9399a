"""Layers whose inputs have logarithmic entries: simulated, saved and restored, learned with, and free of them again."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.methods.inputs.tiers import quantized
from mlxquant.sweep.reconstruction import Minibatch, SoftLayer

CLOCK = Clock()
SIGMA = np.float32([0.1, 0.5, 1.0])
LOG = (True, False, True)


def table(log=LOG, width=1):
    shift = np.random.default_rng(3).normal(-1, 0.2, (3, width)).astype(np.float32)
    return ActivationTable(SIGMA, np.float32([3, 0.02, 4]), shift, np.uint8([4, 8, 6]), np.array(log))


def layer(format="w4", activations=None, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 0.05, (12, 128)).astype(np.float32)
    grid = fit_extremes(weight, WeightFormat.parse(format))
    made = QuantizedLinear(grid.quantize(weight), grid, mx.array(rng.normal(size=12).astype(np.float32)))
    if activations is not None:
        made.set_activations(activations, CLOCK)
    return made


def inputs(batch=3):
    return mx.array(np.random.default_rng(1).exponential(0.7, (batch, 5, 128)).astype(np.float32) - 1)


def at(sigma, made, x):
    with CLOCK.at(sigma):
        return np.array(made(x))


@pytest.mark.parametrize("width", [1, 128])
@pytest.mark.parametrize("format", ["w4", "w8", "w7", "w4-g64", "w4-tensor", "w4-asym"])
def test_the_output_is_that_of_the_represented_input(format, width):
    made, x = layer(format, table(width=width)), inputs()
    weight = np.array(made.dequantized()).astype(np.float64)
    for t, sigma in enumerate(SIGMA):
        seen = quantized(made.table, t, np.array(x)).astype(np.float64)
        np.testing.assert_allclose(at(sigma, made, x), seen @ weight.T + np.array(made.bias), rtol=2e-5, atol=2e-5)


def test_a_batch_may_mix_both_kinds():
    made, x = layer(activations=table()), inputs()
    together = at(SIGMA, made, x)
    for t, sigma in enumerate(SIGMA):
        np.testing.assert_allclose(together[t], at(sigma, made, x[t : t + 1])[0], rtol=2e-5, atol=2e-5)


def test_structure_and_parameters_bring_it_back():
    made, x = layer(activations=table()), inputs()
    facts = json.loads(json.dumps(made.facts))
    again = QuantizedLinear.blank(facts, CLOCK)
    again.load_weights(list(made.parameters().items()))
    again.refresh()
    assert facts["log"]
    for sigma in (*SIGMA, 0.3):
        np.testing.assert_array_equal(at(sigma, again, x), at(sigma, made, x))


def test_uniform_layers_are_stored_as_before_and_older_files_are_read():
    made = layer(activations=table(log=(False,) * 3))
    assert not [name for name in made.parameters() if "log" in name]
    older = {key: value for key, value in made.facts.items() if key != "log"}
    again = QuantizedLinear.blank(older, CLOCK)
    assert set(again.parameters()) == set(made.parameters())


def test_another_table_replaces_it_and_dropping_leaves_nothing():
    made = layer(activations=table())
    assert made.with_codes(made.codes()).table.log.tolist() == list(LOG)
    made.set_activations(table(log=(False,) * 3), CLOCK)
    assert not made.table.log.any()
    assert "act_log" not in made
    made.set_activations(table(), CLOCK)
    made.drop_activations()
    assert not [name for name in made.parameters() if name.startswith("act_")]


def test_soft_layers_see_the_same_inputs_and_their_gradients_reach_what_wrote_them():
    made, x = layer(activations=table()), inputs()
    minibatch = Minibatch(level=mx.array([0, 1, 2]))
    soft = SoftLayer(made, SIGMA, minibatch, 0.0, 0)
    np.testing.assert_allclose(np.array(soft(x)), at(SIGMA, made, x), rtol=2e-5, atol=2e-5)
    slope = np.array(mx.grad(lambda v: soft(v).sum())(x))
    straight = np.array(made.dequantized()).sum(0)
    assert (np.abs(slope) > 0).mean() > 0.5
    np.testing.assert_allclose(slope[slope != 0], np.broadcast_to(straight, slope.shape)[slope != 0], rtol=1e-4)
