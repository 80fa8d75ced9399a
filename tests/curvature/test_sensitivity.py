"""Sensitivities against the exact Gauss-Newton diagonal and against errors that are really made."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import gc
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.calibration.passes import Passes
from mlxquant.curvature.sensitivity import Sensitivity, measure
from mlxquant.errors import NumericsError
from mlxquant.layers.tree import get_module, swapped
from mlxquant.models.stages import Stage

from support.synthetic_chain import Chain
from support.tiny_pictures import tiny_adapter

BLOCK = "multimodal_transformer_blocks.0"
LAYERS = {  # path: tokens of its output
    f"{BLOCK}.image_transformer_block.attn.q_proj": 64,
    f"{BLOCK}.image_transformer_block.mlp.fc1": 64,
    f"{BLOCK}.text_transformer_block.mlp.fc2": 12,
    "multimodal_transformer_blocks.1.image_transformer_block.attn.o_proj": 64,
    "final_layer.linear": 64,
}
SIGMA = 0.6


def states_of(adapter, rows=1, copies=1, sigma=SIGMA):
    """``copies`` of a chain input with ``rows`` different rows, as one state."""
    text = adapter.encode([p.text for p in adapter.prompts("calibration", rows)])
    noise = mx.random.normal((rows, *adapter.latent_shape), key=mx.random.key(5))
    many = mx.tile(mx.arange(rows), (copies,))
    return adapter.state(noise[many], text.take(many), sigma)


def velocity(adapter, state, sigma=SIGMA):
    with adapter.clock.at(sigma):
        for stage in adapter.stages:
            state = stage.run(state)
    return state["velocity"]


class Disturbed(nn.Module):
    """A layer with something added to its output."""

    def __init__(self, layer, error):
        super().__init__()
        self._layer, self._error = layer, error

    def __call__(self, x):
        return self._layer(x) + self._error


@contextmanager
def disturbed(adapter, path, error):
    with swapped(adapter.module, {path: Disturbed(get_module(adapter.module, path), error)}):
        yield


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter()


@pytest.fixture(scope="module")
def measured(adapter):
    """Of one row, with 256 draws of signs."""
    return measure(Passes(adapter, [SIGMA]), adapter.stages, [states_of(adapter, copies=256)], LAYERS)


def exact(adapter, tokens, width, run):
    """The diagonal of J^T J [width], summed over tokens and averaged over the velocity's elements: one row of J by each
    of those, 256 at a time. ``run`` adds [B,tokens,width] inside the model and returns the velocity."""
    total, size = np.zeros(width), int(np.prod(adapter.latent_shape))
    for start in range(0, size, 256):
        state = states_of(adapter, copies=256)
        picked = mx.eye(size)[start : start + 256].reshape(256, *adapter.latent_shape)
        rows = mx.grad(lambda error, state=state, picked=picked: (run(error, state) * picked).sum())(
            mx.zeros((256, tokens, width))
        )
        total += np.array(mx.square(rows).sum((0, 1)), np.float64)
    return total / size


def assert_close(found, expected):
    """256 draws leave every channel within a third of the truth and their sum within a few per cent."""
    assert found.sum() == pytest.approx(expected.sum(), rel=0.1)
    np.testing.assert_allclose(found, expected, rtol=0.35)


@pytest.mark.parametrize(
    "path", [f"{BLOCK}.image_transformer_block.attn.q_proj", f"{BLOCK}.text_transformer_block.mlp.fc2"]
)
def test_a_layers_costs_are_the_exact_diagonal(adapter, measured, path):
    def run(error, state):
        with disturbed(adapter, path, error):
            return velocity(adapter, state)

    assert_close(measured.layers[path][0], exact(adapter, LAYERS[path], 32, run))


@pytest.mark.parametrize(("key", "tokens"), [("image", 64), ("text", 12)])
def test_a_stages_costs_are_the_exact_diagonal(adapter, measured, key, tokens):
    def run(error, state):
        with adapter.clock.at(SIGMA):
            for stage in adapter.stages:
                state = stage.run(state)
                if stage.name == BLOCK:
                    state = state | {key: state[key] + error}
        return state["velocity"]

    assert_close(measured.stages[BLOCK][key][0], exact(adapter, tokens, 32, run))


@pytest.mark.parametrize("path", LAYERS)
def test_noise_costs_what_is_predicted(adapter, measured, path):
    """Small independent errors at every token and output, 128 draws, and the mean squared change of the velocity that
    they make.
    """
    costs, state = measured.layers[path][0], states_of(adapter, copies=128)
    error = mx.random.normal((128, LAYERS[path], len(costs)), key=mx.random.key(1)) * 1e-2
    before = velocity(adapter, state)
    with disturbed(adapter, path, error):
        change = float(mx.square(velocity(adapter, state) - before).mean())
    assert change == pytest.approx(1e-4 * costs.sum(), rel=0.2)


def test_what_never_reaches_the_velocity_costs_nothing(adapter):
    path = "multimodal_transformer_blocks.1.text_transformer_block.attn.q_proj"  # the last block drops what text asks
    found = measure(Passes(adapter, [SIGMA]), adapter.stages, [states_of(adapter)], [path]).layers[path]
    assert found.shape == (1, 32)
    assert (found == 0).all()


def test_a_louder_head_costs_four_times(adapter):
    louder, state = tiny_adapter(), states_of(adapter, rows=2)
    louder.module.final_layer.linear.weight = louder.module.final_layer.linear.weight * 2
    once, twice = (measure(Passes(a, [SIGMA]), a.stages, [state], LAYERS) for a in (adapter, louder))
    for path in LAYERS:
        factor = 1 if path == "final_layer.linear" else 4
        np.testing.assert_allclose(twice.layers[path], factor * once.layers[path], rtol=1e-4)
    for name, tensors in once.stages.items():
        for key, table in tensors.items():
            np.testing.assert_allclose(twice.stages[name][key], 4 * table, rtol=1e-4)


def test_the_end_of_a_chain_is_measured_from_its_own_inputs(adapter):
    state = states_of(adapter)
    with adapter.clock.at(SIGMA):
        later = adapter.stages[0].run(state)
    whole, part = (
        measure(Passes(adapter, [SIGMA]), adapter.stages, [state], LAYERS),
        measure(Passes(adapter, [SIGMA]), adapter.stages[1:], [later], LAYERS),
    )
    assert set(whole.stages) - set(part.stages) == {"embed"}
    for path in LAYERS:
        np.testing.assert_allclose(part.layers[path], whole.layers[path], rtol=1e-4)


def test_rows_of_a_level_are_averaged_and_levels_ascend(adapter):
    levels = [0.9, 0.3, 0.9]
    states = [states_of(adapter, rows=rows, sigma=sigma) for rows, sigma in zip((1, 1, 3), levels, strict=True)]
    found = measure(Passes(adapter, levels), adapter.stages, states, LAYERS)
    np.testing.assert_array_equal(found.sigma, np.float32([0.3, 0.9]))
    for path in LAYERS:
        alone = [
            measure(Passes(adapter, levels[i : i + 1]), adapter.stages, [x], [path], seed=i).layers[path][0]
            for i, x in enumerate(states)
        ]
        np.testing.assert_allclose(found.layers[path], [alone[1], (alone[0] + 3 * alone[2]) / 4], rtol=1e-5)


def test_rows_are_differentiated_as_many_as_the_model_allows_at_once(adapter):
    """Two at a time give the same sums, and no pass through a block has more."""
    state = states_of(adapter, rows=5)
    whole = measure(Passes(adapter, [SIGMA]), adapter.stages, [state], LAYERS)
    careful, seen = tiny_adapter(), []
    careful.rows = 2

    def watched(stage):
        return Stage(stage.name, stage.prefixes, lambda state: (seen.append(len(state["latent"])), stage.run(state))[1])

    found = measure(Passes(careful, [SIGMA]), [watched(stage) for stage in careful.stages], [state], LAYERS)
    assert set(seen) == {1, 2}
    for path in LAYERS:
        np.testing.assert_allclose(found.layers[path], whole.layers[path], rtol=1e-4)
    for name, tensors in whole.stages.items():
        for key, table in tensors.items():
            np.testing.assert_allclose(found.stages[name][key], table, rtol=1e-4)


def test_only_what_enters_the_stages_is_held_for_all_of_them():
    """A block more costs little more than the states that enter it, not what is inside of it."""
    peaks = []
    for blocks in (2, 12):
        chain = Chain(blocks)
        text = chain.encode(["x"] * 8)
        state = chain.state(mx.zeros((8, *chain.latent_shape)), text, SIGMA)
        mx.eval(state, chain.module.parameters())
        gc.collect()  # what other tests left would be freed in between, and lower the peak
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        measure(Passes(chain, [SIGMA]), chain.stages, [state], chain.layers())
        peaks.append(mx.get_peak_memory() - before)
    entering = 8 * 256 * 64 * 4
    assert peaks[1] - peaks[0] < 10 * entering * 1.2


def test_equal_seeds_give_equal_bytes(adapter):
    first, same, other = (
        measure(Passes(adapter, [SIGMA]), adapter.stages, [states_of(adapter)], LAYERS, seed=seed) for seed in (0, 0, 1)
    )
    for path in list(LAYERS)[:-1]:
        np.testing.assert_array_equal(first.layers[path], same.layers[path])
        assert not np.array_equal(first.layers[path], other.layers[path])


def test_costs_are_looked_up_at_the_nearest_level():
    found = Sensitivity(np.float32([0.2, 0.8]), {}, {"a": np.array([[1.0, 3.0], [5.0, 7.0]])})
    np.testing.assert_array_equal(
        found.of_outputs("a", np.float32([0.0, 0.45, 0.55, 1.0])), [[1, 3], [1, 3], [5, 7], [5, 7]]
    )
    assert found.of_outputs("b", [0.5]) is None
    assert found.of_layer("a", 0.9) == pytest.approx(1.5)
    assert found.of_layer("b", 0.9) == 1


def test_the_model_is_as_before_also_after_an_exception(adapter):
    fingerprint, linears = adapter.fingerprint, adapter.layers()

    def fails(state):
        raise RuntimeError("in the middle")

    broken = (*adapter.stages[:2], Stage("head", (), fails))
    with pytest.raises(RuntimeError, match="in the middle"):
        measure(Passes(adapter, [SIGMA]), broken, [states_of(adapter)], LAYERS)
    measure(Passes(adapter, [SIGMA]), adapter.stages, [states_of(adapter)], LAYERS)
    assert adapter.fingerprint == fingerprint
    assert all(layer is linears[path] for path, layer in adapter.layers().items())


def test_an_overflow_is_named(adapter):
    state = states_of(adapter)
    state["latent"] = mx.full(state["latent"].shape, float("nan"))
    with pytest.raises(NumericsError, match=r"sigma 0\.6: the velocity's gradient with respect to embed/image is NaN"):
        measure(Passes(adapter, [SIGMA]), adapter.stages, [state], LAYERS)


def test_tables_hold_all_of_it(adapter):
    found = measure(Passes(adapter, [SIGMA]), adapter.stages, [states_of(adapter)], LAYERS)
    again = Sensitivity.of(found.tables)
    assert again.sigma.dtype == found.sigma.dtype
    assert again.sigma.tolist() == found.sigma.tolist()
    for one, other in ((again.stages, found.stages), ({"": again.layers}, {"": found.layers})):
        assert {k: {n: t.tolist() for n, t in v.items()} for k, v in one.items()} == {
            k: {n: t.tolist() for n, t in v.items()} for k, v in other.items()
        }
