"""Factors of Hessians against explicit Jacobians in float64, by differences, of a chain that is computed in NumPy."""

import mlxquant as mq  # before mlx

# isort: split
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxquant.calibration.trajectories import collect
from mlxquant.curvature import factors
from mlxquant.curvature.backward import Backward
from mlxquant.curvature.factors import measure
from mlxquant.errors import NumericsError
from mlxquant.layers.convolutions import CONVOLUTIONS
from mlxquant.layers.kinds import KINDS, known_kind
from mlxquant.layers.switch import SwitchLinear
from mlxquant.layers.tree import get_module

from support.kinds_chain import Kinds
from support.synthetic_chain import Chain
from support.tiny_pictures import tiny_adapter

SIDE, WIDTH, SKIP = 2, 6, 0.7
CALLS = ("embed", "context", "blocks.0 first", "blocks.0 again", "blocks.1", "head")


class Skipping(Chain):
    """With a skip from the embedder to the head, and a layer that is called twice; not all levels weigh alike."""

    rows = 4

    def __init__(self):
        super().__init__(blocks=2, width=WIDTH, side=SIDE)

    def level_weights(self, sigmas):
        return 1 + np.asarray(sigmas)

    def _embed(self, state):
        found = super()._embed(state)
        return found | {"skip": found["image"]}

    def _block(self, index, state):
        x, layer = state["image"], self.module.blocks[index]
        y = nn.relu(layer(x))
        return state | {"image": x + (y + nn.relu(layer(0.5 * y)) if index == 0 else y)}

    def _head(self, state):
        return {"velocity": self.module.head(state["image"] + SKIP * state["skip"]).reshape(state["latent"].shape)}


def in_numpy(weights, state, added=None):
    """The same in float64: the velocity, and what each call reads [rows,tokens,in]; calls answer with what is added."""
    read, added = {}, added or {}

    def layer(call, x):
        weight, bias = weights[call.split()[0]]
        read[call] = x
        return x @ weight.T + bias + added.get(call, 0)

    def relu(x):
        return np.maximum(x, 0)

    image = layer("embed", state["latent"].reshape(len(state["latent"]), -1, 4))
    image = skip = image + layer("context", state["tokens"]) + np.cos(state["t"])[:, None, None]
    y = relu(layer("blocks.0 first", image))
    image = image + y + relu(layer("blocks.0 again", 0.5 * y))
    image = image + relu(layer("blocks.1", image))
    return layer("head", image + SKIP * skip), read


def differences(function, at, step=1e-5):
    """The gradient of a function of an array."""
    found = np.zeros(at.shape)
    for place in np.ndindex(at.shape):
        unit = np.zeros(at.shape)
        unit[place] = step
        found[place] = (function(at + unit) - function(at - unit)) / (2 * step)
    return found


def exact_factors(adapter, probes, seed):
    """Of each layer the inputs' gram, H_I and H_O by sketch A, and by sketch B."""
    weights = {
        path: tuple(np.array(value, np.float64) for value in (layer.weight, layer.bias))
        for path, layer in adapter.layers().items()
    }
    totals = {}
    for batch, (state, prompted) in enumerate(zip(probes.states, probes.prompted, strict=True)):
        predicted = {"velocity": mx.zeros((len(prompted), SIDE, SIDE, 4))}
        drawn = np.array(probes.objective.slopes(predicted, prompted, seed + batch)["velocity"], np.float64)
        drawn *= np.sqrt(1 + probes.sigmas[batch])
        for start in range(0, len(prompted), probes.sides):
            rows = slice(start, start + probes.sides)
            some = {key: np.array(value[rows], np.float64) for key, value in state.items()}
            signs = drawn[rows].reshape(probes.sides, -1, 4)
            _, read = in_numpy(weights, some)

            def along(added, call, signs=signs, some=some):
                return (signs * in_numpy(weights, some, {call: added})[0]).sum()

            whole = {}
            for call, x in read.items():
                path = call.split()[0]
                shape = (*x.shape[:2], weights[path][0].shape[0])
                g = differences(lambda added, call=call: along(added, call), np.zeros(shape)).reshape(-1, shape[-1])
                x = x.reshape(-1, x.shape[-1])
                energies = [(x.T @ x), (x.T * np.square(g).sum(1)) @ x, (g.T * np.square(x).sum(1)) @ g]
                before = totals.setdefault(path, [0, 0, 0, 0, 0])
                before[:3] = [a + b for a, b in zip(before[:3], energies, strict=True)]
                whole[path] = whole.get(path, 0) + g.T @ x
            for path, together in whole.items():
                totals[path][3] = totals[path][3] + together.T @ together
                totals[path][4] = totals[path][4] + together @ together.T
            moved = weights | {"blocks.0": None}
            found = differences(
                lambda w, moved=moved, signs=signs, some=some: (
                    signs * in_numpy(moved | {"blocks.0": (w, weights["blocks.0"][1])}, some)[0]
                ).sum(),
                weights["blocks.0"][0],
            )
            np.testing.assert_allclose(whole["blocks.0"], found, rtol=1e-5, atol=1e-6)  # G is the weight's gradient
    return totals


def all_factors(curvature, adapter):
    found = {}
    for stage in adapter.stages:
        found |= curvature.of_stage(adapter, stage, [path for path in adapter.layers() if stage.owns(path)])
    return found


@pytest.mark.parametrize("cfg", [2.0, 1.0])
def test_factors_are_those_of_explicit_jacobians(cfg):
    """Of Linears, around a skip, of a layer that is called twice; with rows with and without their prompt side by side,
    and of two pictures in a batch.
    """
    adapter = Skipping()
    calib = collect(adapter, adapter.prompts("calibration", 3), 2, cfg)
    probes = calib.probes(adapter)
    assert max(map(len, probes.prompted)) == 2 * probes.sides
    curvature = measure(adapter, probes, seed=11)
    assert curvature.rows == probes.rows == 4 * probes.sides
    found, expected = all_factors(curvature, adapter), exact_factors(adapter, probes, 11)
    assert found.keys() == expected.keys() == adapter.layers().keys()
    for path, layer in found.items():
        a, b = (layer.factors[name] for name in "AB")
        ours = (layer.gram, a.inputs, a.outputs, b.inputs, b.outputs)
        for got, wanted in zip(ours, expected[path], strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, wanted, atol=2e-4 * np.abs(wanted).max(), rtol=1e-3, err_msg=path)
    tokens = {path: 1 if path == "context" else 2 * SIDE**2 if path == "blocks.0" else SIDE**2 for path in found}
    assert {path: layer.tokens for path, layer in found.items()} == {p: n * probes.rows for p, n in tokens.items()}

    other = Skipping()  # a copy: same numbers, other modules
    again = measure(adapter, probes, seed=11)
    copied = all_factors(again, other)
    for path, layer in found.items():
        np.testing.assert_array_equal(copied[path].factors["B"].outputs, layer.factors["B"].outputs)
        assert curvature.of_stage(other, other.stages[0], ["embed"], ["A"])["embed"] is found["embed"]  # made once


def test_one_sketch_alone_is_the_same():
    adapter = Skipping()
    probes = collect(adapter, adapter.prompts("calibration", 2), 2, 2.0).probes(adapter)
    both = all_factors(measure(adapter, probes), adapter)
    for name in "AB":
        (one,) = measure(adapter, probes).of_stage(adapter, adapter.stages[1], ["blocks.0"], [name]).values()
        assert one.factors.keys() == {name}
        np.testing.assert_array_equal(one.factors[name].inputs, both["blocks.0"].factors[name].inputs)
        np.testing.assert_array_equal(one.gram, both["blocks.0"].gram)


def test_other_seeds_draw_other_vectors():
    adapter = Skipping()
    probes = collect(adapter, adapter.prompts("calibration", 2), 2, 2.0).probes(adapter)
    one, same, other = (all_factors(measure(adapter, probes, seed=seed), adapter)["embed"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.factors["A"].outputs, same.factors["A"].outputs)
    assert (one.factors["A"].outputs != other.factors["A"].outputs).any()
    np.testing.assert_array_equal(one.gram, other.gram)


def test_convolutions_and_layers_that_are_left_out():
    """Sketch B of a convolution is made of the gradients of its kernel. Experts, grouped convolutions and tables of
    embeddings have no factors.
    """
    adapter = Kinds(side=4)
    probes = collect(adapter, adapter.prompts("calibration", 2), 2, 1.0).probes(adapter)
    found = all_factors(measure(adapter, probes, seed=3), adapter)
    assert set(found) == {"embed", "context", "down", "up", "head"}
    for path, layer in found.items():
        module, outer, inner = get_module(adapter.module, path), 0.0, 0.0
        form = known_kind(module).form
        for batch, (state, prompted) in enumerate(zip(probes.states, probes.prompted, strict=True)):
            drawn = probes.objective.slopes({"velocity": mx.zeros(state["latent"].shape)}, prompted, 3 + batch)
            for row in range(len(prompted)):
                kernel = module.weight

                def predicted(weight, state=state, row=row, batch=batch, drawn=drawn, module=module):
                    module.weight = weight
                    after = {key: value[row : row + 1] for key, value in state.items()}
                    with adapter.clock.at(probes.sigmas[batch]):
                        for stage in adapter.stages:
                            after = stage.run(after)
                    return (after["velocity"] * drawn["velocity"][row]).sum()

                gradient = mx.grad(predicted)(kernel)
                module.weight = gradient
                together = np.array(form.matrix_of(module), np.float64)
                module.weight = kernel
                outer, inner = outer + together @ together.T, inner + together.T @ together
        factor = layer.factors["B"]
        np.testing.assert_allclose(factor.outputs, outer, atol=1e-3 * np.abs(outer).max(), err_msg=path)
        np.testing.assert_allclose(factor.inputs, inner, atol=1e-3 * np.abs(inner).max(), err_msg=path)
        a = layer.factors["A"]
        np.testing.assert_allclose(np.trace(a.inputs), np.trace(a.outputs), rtol=1e-4)  # both Σ |g|² |x|²


class Idle(Skipping):
    """What its blocks write reaches nothing."""

    def _head(self, state):
        return super()._head(state | {"image": 0 * state["skip"]})


def test_what_nothing_hangs_on_has_no_factors():
    adapter = Idle()
    probes = collect(adapter, adapter.prompts("calibration", 2), 1, 2.0).probes(adapter)
    found = all_factors(measure(adapter, probes), adapter)
    assert {path: set(layer.factors) for path, layer in found.items()} == {
        "embed": {"A", "B"}, "context": {"A", "B"}, "blocks.0": set(), "blocks.1": set(), "head": {"A", "B"},
    }  # fmt: skip
    assert all(layer.gram.any() for layer in found.values())


def test_rows_and_bytes_limit_what_is_differentiated(monkeypatch):
    adapter = Skipping()
    probes = collect(adapter, adapter.prompts("calibration", 9), 3, 2.0).probes(adapter)
    assert probes.rows == 3 * 7 * 2  # of each level batches of 4, 4, 4 and 2
    assert measure(adapter, probes).rows == probes.rows
    assert measure(adapter, probes, rows=12).rows <= 12
    assert measure(adapter, probes, rows=1).rows == 4
    state = probes.states[0]
    with adapter.clock.at(probes.sigmas[0]):
        entered = Backward(adapter.stages).forward(state)
    one = factors._bytes(entered) / len(probes.prompted[0])
    monkeypatch.setattr(factors, "HELD", int(2 * one * 8.5))
    some = measure(adapter, probes)
    assert 4 <= some.rows <= 8
    assert len(set(some.sigmas)) > 1  # evenly spread
    monkeypatch.setattr(factors, "HELD", 10)  # neither rows nor factors have room: one batch, and nothing is kept
    few = measure(adapter, probes)
    assert few.rows <= 4
    first, second = (few.of_stage(adapter, adapter.stages[0], ["embed"])["embed"] for _ in range(2))
    assert first is not second
    np.testing.assert_array_equal(first.gram, second.gram)


def test_a_gradient_that_is_not_finite_names_its_layer():
    adapter = Skipping()
    probes = collect(adapter, adapter.prompts("calibration", 2), 1, 2.0).probes(adapter)

    class Bad:
        def slopes(self, predicted, prompted, seed):
            return tree_map(lambda v: v * mx.inf, predicted)

    curvature = measure(adapter, replace(probes, objective=Bad()))
    with pytest.raises(NumericsError, match=r"with respect to blocks\.0 is NaN or infinite"):
        curvature.of_stage(adapter, adapter.stages[1], ["blocks.0"])


@pytest.mark.parametrize("make", [Skipping, tiny_adapter])
def test_a_chain_backward_is_the_gradient_of_the_rest_of_it(make):
    adapter = make()
    text = adapter.encode([p.text for p in adapter.prompts("calibration", 2)])
    state = adapter.state(mx.random.normal((2, *adapter.latent_shape), key=mx.random.key(5)), text, 0.6)
    chain, stages = Backward(adapter.stages), adapter.stages
    with adapter.clock.at(0.6):
        entered = chain.forward(state)
        signs = mx.random.normal((2, *adapter.latent_shape), key=mx.random.key(1))
        np.testing.assert_array_equal(chain.predicted(state)["velocity"], stages[-1].run(entered[-1])["velocity"])
        slopes = {"velocity": signs}
        for index in reversed(range(1, len(stages))):
            slopes, _ = chain.backward(index, entered[index], slopes, {})

            def rest(arrays, index=index):
                after = entered[index] | arrays
                for stage in stages[index:]:
                    after = stage.run(after)
                return (after["velocity"] * signs).sum()

            wanted = mx.grad(rest)({key: entered[index][key] for key in slopes})
            for key, slope in wanted.items():
                scale = float(mx.abs(slope).max())
                np.testing.assert_allclose(slopes[key], slope, atol=1e-4 * max(scale, 1e-6), err_msg=f"{index} {key}")
        assert slopes


def _layers():
    random = np.random.default_rng(0)

    def filled(layer):
        layer.update(tree_map(lambda v: mx.array(random.normal(size=v.shape).astype(np.float32)), layer.parameters()))
        return layer

    return {
        "linear": (filled(nn.Linear(5, 3)), (2, 4, 5)),
        "one token a row": (filled(nn.Linear(5, 3)), (4, 5)),
        "pictures": (filled(nn.Linear(5, 3, bias=False)), (2, 3, 4, 5)),
        "convolution": (filled(nn.Conv2d(3, 4, 3, padding=1, stride=2)), (2, 7, 6, 3)),
        "dilated": (filled(nn.Conv2d(3, 4, (3, 2), padding=(2, 0), dilation=2)), (2, 7, 6, 3)),
        "of sound": (filled(nn.Conv1d(3, 4, 3, padding=1)), (2, 9, 3)),
        "of films": (filled(nn.Conv3d(2, 4, 2)), (2, 3, 4, 3, 2)),
        "transposed": (filled(nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1)), (2, 4, 3, 3)),
        "transposed sound": (filled(nn.ConvTranspose1d(3, 4, 3, stride=2)), (2, 5, 3)),
        "many outputs": (filled(nn.Conv2d(2, 3, 1)), (2, 40, 60, 2)),
    }


LAYERS = _layers()


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_belong_to_the_rows_that_are_read(name):
    layer, shape = LAYERS[name]
    x = mx.array(np.random.default_rng(1).normal(size=shape).astype(np.float32))
    form = known_kind(layer).form
    assert form.tells_outputs
    (rows,) = form.read(layer, x).parts
    weight, bias = np.array(form.matrix_of(layer)), np.array(layer.bias) if "bias" in layer else 0
    outputs = form.read_outputs(layer, layer(x), x)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, rows @ weight.T + bias, atol=1e-4)
    np.testing.assert_array_equal(form.read_outputs(layer, layer(x).astype(mx.float16), x).dtype, np.float32)


def test_every_kind_says_whether_it_tells_outputs():
    telling = {kind.replaces for kind in KINDS if kind.form.tells_outputs}
    assert telling == {nn.Linear, *(one.replaces for one in CONVOLUTIONS)}
    assert {type(layer) for layer, _ in LAYERS.values()} >= telling - {nn.ConvTranspose3d}
    assert {kind.replaces for kind in KINDS} - telling == {nn.Embedding, SwitchLinear}


def test_text_has_factors_of_the_next_token(tmp_path):
    """The Hessian of a head's outputs is Fisher's information, summed over tokens and weighed by their inputs."""
    from support.tiny_language import gpt_folder

    model = mq.load(gpt_folder(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("def add(first, second):\n    return first + second\n" * 200)
    calib = mq.calibrate_text(model, text, samples=9, length=16)
    curvature = measure(model.adapter, calib.probes(model.adapter), seed=2)
    assert curvature.rows == 7  # two of nine are held out
    found = all_factors(curvature, model.adapter)
    assert all(set(layer.factors) == {"A", "B"} for layer in found.values())
    assert all(layer.tokens % (7 * 16) == 0 for layer in found.values())
