"""Limits beside results: figures against references that are computed another way, on a model of random weights."""

import json
from importlib import import_module
from pathlib import Path

import mlxquant as mq  # before mlx

# isort: split
import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.layers.tree import get_module
from mlxquant.numerics.rate_distortion import least_loss
from mlxquant.sampling.guidance import guided

from support.tiny_pictures import tiny_adapter


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return import_module("limits")


@pytest.fixture(scope="module")
def model():
    return mq.Model(tiny_adapter())


@pytest.fixture(scope="module")
def calibration(model):
    return mq.calibrate(model, prompts=2, steps=2)


def test_gradients_are_those_of_the_weights(script, model, calibration):
    """By the dials and the inputs, against MLX's gradient with respect to the weight itself, a picture at a time."""
    paths, adapter, key = script.quantized_paths(model)[:4], model.adapter, mx.random.key(5)
    found, velocity = script.gradients(adapter, calibration, 1, slice(0, 2), paths, key)
    signs = mx.random.bernoulli(0.5, velocity.shape, key).astype(mx.float32) * 2 - 1
    for picture in range(2):
        one = calibration.part(pictures=slice(picture, picture + 1))
        text, other = adapter.both_sides([one.prompts[0].text], one.guidance)

        def projected(module, one=one, text=text, other=other, picture=picture):
            latent, sigma = one.latents[1], float(one.sigmas[1])
            v = guided(adapter.velocity, latent, sigma, text, other, one.guidance)
            return (signs[picture] * v[0]).sum()

        exact = nn.value_and_grad(model.module, projected)(model.module)[1]
        for path in paths:
            expected = np.array(_at(exact, path)["weight"])
            assert np.abs(found[path][picture] - expected).max() < 1e-4 * np.abs(expected).max(), path


def _at(tree, path):
    for part in path.split("."):
        tree = tree[int(part)] if part.isdigit() else tree[part]
    return tree


def test_grams_are_those_of_the_inputs(script, model, calibration):
    paths, seen = script.quantized_paths(model), {}

    class Seen(nn.Module):
        def __init__(self, layer, path):
            super().__init__()
            self._layer, self._path = layer, path

        def __call__(self, x):
            x64 = np.array(x).astype(np.float64).reshape(-1, x.shape[-1])
            seen[self._path] = seen.get(self._path, 0) + x64.T @ x64
            return self._layer(x)

    found = script.grams(model, calibration, paths)
    with script.swapped(model.module, {path: Seen(get_module(model.module, path), path) for path in paths}):
        for prompt in range(2):  # a picture at a time, as the sampler asks
            one = calibration.part(pictures=slice(prompt, prompt + 1))
            text, other = model.adapter.both_sides([one.prompts[0].text], one.guidance)
            for step in range(2):
                latent, sigma = one.latents[step], float(one.sigmas[step])
                mx.eval(guided(model.adapter.velocity, latent, sigma, text, other, one.guidance))
    for path in paths:
        assert np.allclose(found[path][0], seen[path], rtol=1e-3, atol=1e-4 * np.abs(seen[path]).max()), path


@pytest.fixture
def metrics(script, model, calibration):
    paths = script.quantized_paths(model)
    grams = script.grams(model, calibration, paths)
    layers = {path: script.Metric(script.matrix(model, path), grams[path]) for path in paths}
    factors, power = script.factors(model, calibration, paths)
    return layers, {p: script.Metric(layers[p].weight, [a], b) for p, (a, b) in factors.items()}, power


def test_figures_of_a_model(script, model, calibration, metrics):
    _, velocity, _ = metrics
    figures = {
        name: script.measured(mq.quantize(model, calibration, name), *metrics)
        for name in ("rtn-w4a16", "gptq-w4a16", "rtn-w2a16-g32")
    }
    for row in figures.values():
        assert row["loss_db"] < row["limit_db"]
        assert row["velocity_loss_db"] < row["velocity_limit_db"] < row["velocity_free_limit_db"]
        assert 0 < row["bits_above"] < row["bits"]
        assert row["entropy"] < row["bits"]
        json.dumps(row)
    four, two = figures["rtn-w4a16"], figures["rtn-w2a16-g32"]
    assert four["loss_db"] < figures["gptq-w4a16"]["loss_db"]
    assert two["bits"] < 4 < four["bits"] < 5
    path = next(iter(velocity))
    weight, (inputs,), outputs = velocity[path].weight, velocity[path].inputs, velocity[path].outputs
    whole = np.kron(outputs, inputs)
    assert velocity[path].loss(weight) == pytest.approx(weight.ravel() @ whole @ weight.ravel(), rel=1e-6)
    assert np.trace(inputs) == pytest.approx(1)


def test_a_limit_with_so_many_bits_fewer_is_the_loss(script, metrics):
    _, velocity, _ = metrics
    some, bits = list(velocity.values()), [4.0 + index % 2 for index in range(len(velocity))]
    left = sum(least_loss(one.spectra, own - 1.5) for one, own in zip(some, bits, strict=True))
    assert script.bits_above(some, bits, left) == pytest.approx(1.5, abs=2e-3)


def test_weights_that_stand_for_others_are_refused(script, model, calibration, metrics):
    other = mq.quantize(model, calibration, "rtn+smoothquant-w4a8")
    with pytest.raises(click.ClickException, match="its codes are of weights after smoothquant"):
        script.measured(other, *metrics)


def test_the_table(script):
    row = dict.fromkeys((*script.MEANS, "velocity_loss_db", "velocity_limit_db", "velocity_bits_above"), 1.234)
    table = script.tables({"gptq-w4a16": row | {"bits_per_weight": 5.0}, "rtn-w4a16": row | {"bits_per_weight": 4.0}})
    head, _, first, second = table.splitlines()
    assert head.count("|") == first.count("|")
    assert first.startswith("| `rtn-w4a16` | 1.23 |")
    assert second.startswith("| `gptq-w4a16` |")
