"""What a sweep costs: copies of hidden states, moments, rows, and stages that run again."""

import weakref
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.calibration.passes import Passes
from mlxquant.curvature import sensitivity
from mlxquant.curvature.sensitivity import measured
from mlxquant.methods import registry
from mlxquant.methods.weights.adaround import Settings
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sweep import rounding, sweep
from mlxquant.sweep.rounding import Rounding
from mlxquant.sweep.streams import ExactStream
from mlxquant.sweep.sweep import Sweep
from mlxquant.sweep.trial import Job

from support.synthetic_chain import Chain


@pytest.fixture
def calib(tiny):
    return mq.calibrate(tiny, prompts=2, steps=2)


def peak_copies(recipe):
    """The most that a sweep holds at once, in copies of the hidden states of all rows."""
    chain = Chain(blocks=3)
    calib = mq.calibrate(mq.Model(chain), prompts=8, steps=4)
    copy = 2 * 8 * 4 * 256 * 64 * 4
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sweep.sweep(chain, calib, recipe)
    return (mx.get_peak_memory() - before) / copy


@pytest.mark.parametrize(
    ("recipe", "corrected", "copies"),
    [("rtn-w4a16", False, 3), ("gptq-w4a16", False, 3), ("gptq-w4a16", True, 4), ("taqdit-w4a16", False, 3)],
)
def test_three_copies_of_the_hidden_states_are_held(recipe, corrected, copies):
    """What enters the stage and what both streams write; a fourth where the rounding looks at what enters the exact
    one.
    """
    made = replace(parse_recipe(recipe), learning=Settings(iterations=25, batch=4))
    rules = tuple((p, replace(s, corrected=corrected)) for p, s in made.rules)
    assert peak_copies(replace(made, rules=rules)) < copies + 0.5


def test_states_are_freed_when_they_have_left_their_stage():
    """A list of the caller's, too: nobody looks at it again."""
    chain = Chain(blocks=2)
    sigmas, made = mq.calibrate(mq.Model(chain), prompts=2, steps=2).batches(chain)
    recipe = parse_recipe("rtn-w4a16")
    plan = recipe.plan(chain.roles())
    passes = Passes(chain, sigmas)
    states = passes.through(chain.stages[0], made)
    stages = Sweep(Job(passes, recipe, plan, ExactStream(passes, states))).run(chain.stages[1:], states)
    assert [stage["stage"] for stage in stages] == ["blocks.0", "blocks.1", "head"]
    assert states == []


def test_moments_are_gone_before_the_stage_is_run(tiny, calib, monkeypatch):
    """They are the largest thing beside the states, and only rounding needs them."""
    alive = []
    statistics, judge = Rounding._statistics, Sweep._judge

    def watched(self, *arguments):
        found = statistics(self, *arguments)
        alive.extend(weakref.ref(layer.moments) for layer in found.values())
        return found

    def judged(self, *arguments, **options):
        assert [ref for ref in alive if ref() is not None] == []
        return judge(self, *arguments, **options)

    monkeypatch.setattr(Rounding, "_statistics", watched)
    monkeypatch.setattr(Sweep, "_judge", judged)
    mq.quantize(tiny, calib, "gptq-w4a8")
    assert len(alive) > 20


def test_moments_go_layer_by_layer(tiny, calib, monkeypatch):
    """Layers that read one tensor share theirs, which are gone after the last of them."""
    groups, counts = {}, []
    statistics, quantize = Rounding._statistics, rounding.quantize_layer

    def watched(self, *arguments):
        found = statistics(self, *arguments)
        groups.clear()
        groups.update({path: (id(layer.moments), weakref.ref(layer.moments)) for path, layer in found.items()})
        return found

    def rounded(linear, spec, moments, path, *how):
        alive = {number for number, ref in groups.values() if ref() is not None}
        counts.append(len(alive))
        assert alive == {number for number, _ in list(groups.values())[list(groups).index(path) :]}
        return quantize(linear, spec, moments, path, *how)

    monkeypatch.setattr(Rounding, "_statistics", watched)
    monkeypatch.setattr(rounding, "quantize_layer", rounded)
    mq.quantize(tiny, calib, "gptq-w4a8")
    assert min(counts) == 1
    assert max(counts) > 5


@pytest.mark.parametrize("hurts", [False, True])
def test_only_a_winner_that_was_not_tried_last_is_run_again(tiny, calib, monkeypatch, hurts):
    runs, run = [], Passes.through
    monkeypatch.setattr(
        Passes, "through", lambda self, stage, states: (runs.append(stage.name), run(self, stage, states))[1]
    )
    if hurts:
        zeros = registry.Method("gptq", "round", lambda w, grid, moments: np.zeros(w.shape, np.uint8), None, "broken")
        get = registry.get
        monkeypatch.setattr(registry, "get", lambda kind, name: zeros if name == "gptq" else get(kind, name))
    stages = mq.quantize(tiny, calib, "gptq-w4a8").facts["stages"]
    assert {stage["kept"] for stage in stages} == {"rtn" if hurts else "calibrated"}
    assert runs == [stage.name for stage in tiny.adapter.stages[:-1] if hurts]


def test_the_limit_of_samples_holds_for_the_sweep_and_is_recorded(tmp_path):
    chain = Chain()
    calib = mq.calibrate(mq.Model(chain), prompts=4, steps=4, samples=6)
    assert calib.latents.shape[:2] == (4, 4)
    chain.seen.clear()
    sweep.sweep(chain, calib, parse_recipe("rtn-w4a16"))
    assert max(chain.seen) == 4
    assert sum(chain.seen) % (2 * 6) == 0
    saved = mq.quantize(mq.Model(Chain()), calib, "rtn-w4a16").facts["calibration"]
    assert (saved["samples"], saved["pictures"]) == (6, [[0], [1, 2], [3], [0, 1]])


def test_prompts_are_encoded_once_in_a_sweep():
    chain = Chain()
    calib = mq.calibrate(mq.Model(chain), prompts=3, steps=2)
    chain.encoded.clear()
    sweep.sweep(chain, calib, parse_recipe("taqdit-w4a16"))
    assert set(chain.encoded.values()) == {1}


@pytest.mark.parametrize(("rows", "expected"), [(2, [2, 2, 2, 2, 2, 2]), (16, [4, 4, 2, 4, 4, 2])])
def test_sensitivities_are_measured_on_a_few_rows_of_each_level(monkeypatch, rows, expected):
    """The first of each batch, one backward pass at most, and no more batches than it takes."""
    chain, seen = Chain(), []
    chain.rows = rows
    monkeypatch.setattr(
        sensitivity,
        "measure",
        lambda passes, stages, states, plan: seen.extend(zip(passes.sigmas, states, strict=True)),
    )
    monkeypatch.setattr(sensitivity, "SENSITIVITY_ROWS", 9)
    sigmas, states = mq.calibrate(mq.Model(chain), prompts=5, steps=2).batches(chain)
    measured(Passes(chain, sigmas), chain.stages, states, {})
    assert [len(state["t"]) for _, state in seen] == expected
    assert [sigma for sigma, _ in seen] == sigmas
    seen.clear()
    monkeypatch.setattr(sensitivity, "SENSITIVITY_ROWS", 2)
    measured(Passes(chain, sigmas), chain.stages, states, {})
    assert [len(state["t"]) for _, state in seen] == [2, 2]
    assert [sigma for sigma, _ in seen] == [sigmas[0], sigmas[3]]
    np.testing.assert_array_equal(np.array(seen[1][1]["latent"]), np.array(states[3]["latent"][:2]))
