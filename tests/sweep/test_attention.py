"""Attention probabilities put on tables: per noise level, from what a stage really computes, with nothing left
behind.
"""

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.calibration.passes import Passes
from mlxquant.errors import NumericsError, RecipeError
from mlxquant.layers.attention import QuantizedAttention, ShownAttention, SoftmaxAttention
from mlxquant.layers.tree import set_module, swapped
from mlxquant.sweep.attention import VALUES, SeenProbabilities, quantize_probabilities
from mlxquant.sweep.streams import stage_error

from support.tiny_pictures import tiny_adapter

STEPS = 3
PATH = "multimodal_transformer_blocks.0.sdpa"


@pytest.fixture(scope="module")
def block():
    """A tiny adapter, its first block, and what enters it at each of a few noise levels."""
    adapter = tiny_adapter()
    sigmas, states = mq.calibrate(mq.Model(adapter), prompts=2, steps=STEPS).batches(adapter)
    embed, first, *_ = adapter.stages
    inputs = Passes(adapter, sigmas).through(embed, [states[i] for i in range(len(sigmas))])
    return adapter, first, inputs, sigmas


def test_a_table_spans_what_was_seen_at_each_noise_level(block):
    adapter, stage, inputs, sigmas = block
    largest = {}
    for sigma, state in zip(sigmas, inputs, strict=True):
        seen = []
        shown = ShownAttention(lambda p, opened, seen=seen: seen.append(p))
        with adapter.clock.at(sigma), swapped(adapter.module, {PATH: shown}):
            mx.eval(stage.run(state))
        largest[np.float32(sigma)] = max(largest.get(np.float32(sigma), 0), seen[0].max().item())
    found = quantize_probabilities(Passes(adapter, sigmas), stage, inputs, 8, method="extremes")
    assert list(found) == [PATH]
    table = found[PATH].table
    assert table.sigma.tolist() == sorted(largest)
    low = table.shift[:, 0] - 128 * table.step
    np.testing.assert_allclose(low, 0, atol=1e-6)
    np.testing.assert_allclose(low + table.span, [largest[s] for s in table.sigma], rtol=1e-5)


def test_nothing_is_installed_and_nothing_is_left_behind(block):
    adapter, stage, inputs, sigmas = block
    before = adapter.attentions()
    quantize_probabilities(Passes(adapter, sigmas), stage, inputs, 4)
    assert adapter.attentions() == before
    assert all(type(m) is SoftmaxAttention for m in before.values())


def test_it_is_reproducible(block):
    adapter, stage, inputs, sigmas = block
    passes = Passes(adapter, sigmas)
    one, two = (quantize_probabilities(passes, stage, inputs, 4)[PATH].table for _ in range(2))
    for name in ("sigma", "step", "shift", "bits", "log"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("method", ["extremes", "dynamic"])
def test_more_bits_write_less_error(block, method):
    adapter, stage, inputs, sigmas = block
    passes = Passes(adapter, sigmas)
    exact, errors = passes.through(stage, inputs), []
    for bits in (4, 6, 8):
        with swapped(adapter.module, dict(quantize_probabilities(passes, stage, inputs, bits, method=method))):
            errors.append(stage_error(passes.through(stage, inputs), exact))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_a_stage_without_exact_attention_has_none(block):
    adapter, stage, inputs, sigmas = block
    assert quantize_probabilities(Passes(adapter, sigmas), adapter.stages[0], inputs, 8) == {}
    found = quantize_probabilities(Passes(adapter, sigmas), stage, inputs, 8)[PATH]
    with swapped(adapter.module, dict.fromkeys(adapter.attentions(), found)):
        assert quantize_probabilities(Passes(adapter, sigmas), adapter.stages[-1], inputs, 8) == {}


def test_a_model_whose_attention_cannot_be_opened_is_refused(block):
    _, _, inputs, sigmas = block
    closed = tiny_adapter()
    for path in list(closed.attentions()):
        set_module(closed.module, path, ShownAttention(lambda *shown: None))
    with pytest.raises(RecipeError, match="attention cannot be opened"):
        quantize_probabilities(Passes(closed, sigmas), closed.stages[1], inputs, 8)


def test_nan_is_named(block):
    adapter, stage, inputs, sigmas = block
    damaged = [{**state, "image": state["image"] * float("nan")} for state in inputs]
    with pytest.raises(NumericsError, match=f"attention {PATH} writes NaN"):
        quantize_probabilities(Passes(adapter, sigmas), stage, damaged, 8)


def test_the_embedded_models_probabilities_follow_power_laws(embedded):
    """And logarithmic levels write several times less error than uniform ones of as many bits."""
    adapter = embedded.adapter
    sigmas, states = mq.calibrate(embedded, prompts=2, steps=3).batches(adapter)
    inputs = Passes(adapter, sigmas).through(adapter.stages[0], [states[i] for i in range(len(sigmas))])
    stage = adapter.stages[1]
    exact, errors = Passes(adapter, sigmas).through(stage, inputs), {}
    for method in ("extremes", "dynamic"):
        found = quantize_probabilities(Passes(adapter, sigmas), stage, inputs, 6, method=method)
        with swapped(adapter.module, dict(found)):
            errors[method] = stage_error(Passes(adapter, sigmas).through(stage, inputs), exact)
    assert isinstance(found[PATH], QuantizedAttention)
    assert found[PATH].table.log.all()
    assert errors["dynamic"] < errors["extremes"] / 4


def test_only_open_places_are_looked_at():
    """Every open place is as likely as any other, however the mask is broadcast."""
    shape = (2, 3, 4, 8)
    p = mx.broadcast_to(mx.arange(4 * 8).reshape(4, 8).astype(mx.float32), shape)
    for mask in (
        np.arange(8) < 5,
        np.array([[[[True] * 5 + [False] * 3]], [[[True] + [False] * 7]]]),
        np.broadcast_to((np.arange(4) < 2)[:, None] & (np.arange(8) < 5), (2, 1, 4, 8)),
    ):
        _, values = SeenProbabilities(1).pick(p, mx.array(mask))
        expected = np.array(p)[np.broadcast_to(mask, shape)]
        found, counts = np.unique(np.array(values), return_counts=True)
        open_, weights = np.unique(expected, return_counts=True)
        np.testing.assert_array_equal(found, open_)
        np.testing.assert_allclose(counts / VALUES, weights / weights.sum(), atol=0.03)


def test_a_mask_that_closes_everything_shows_zeros():
    largest, values = SeenProbabilities(1).pick(mx.zeros((2, 1, 4, 8)), mx.zeros((2, 1, 1, 8), mx.bool_))
    assert not np.array(largest).any()
    assert values.shape == (VALUES,)
    assert not np.array(values).any()
