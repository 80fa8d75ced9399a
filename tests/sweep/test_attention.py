"""Attention probabilities put on tables: per noise level, from what a stage really computes, with nothing left
behind.
"""

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.errors import NumericsError, RecipeError
from mlxquant.layers.attention import QuantizedAttention, ShownAttention, SoftmaxAttention
from mlxquant.layers.tree import set_module, swapped
from mlxquant.sweep.attention import quantize_probabilities
from mlxquant.sweep.streams import Passes, stage_error

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
        with adapter.clock.at(sigma), swapped(adapter.module, {PATH: ShownAttention(seen.append)}):
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
        set_module(closed.module, path, ShownAttention(lambda p: None))
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
