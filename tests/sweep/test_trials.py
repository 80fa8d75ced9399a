"""One stage rounded in several ways: what each trial is made of, and what is left of it in the model."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.calibration.passes import Passes
from mlxquant.curvature.sensitivity import Sensitivity
from mlxquant.layers.tree import parameters, swapped, tapped
from mlxquant.numerics.transform import Transform
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sweep.rounding import Rounding
from mlxquant.sweep.streams import ExactStream, stage_error
from mlxquant.sweep.trial import Job

from support.tiny_pictures import tiny_adapter

FC2 = "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2"


@pytest.fixture(scope="module")
def block():
    """A tiny model over the calibration batches, its first block, and what enters it."""
    adapter = tiny_adapter()
    sigmas, states = mq.calibrate(mq.Model(adapter), prompts=2, steps=3).batches(adapter)
    embed, first, *_ = adapter.stages
    passes = Passes(adapter, sigmas)
    return passes, first, passes.through(embed, [states[i] for i in range(len(sigmas))])


def rounding(block, recipe, gate=True, sensitivity=None):
    passes, stage, inputs = block
    made = replace(parse_recipe(recipe), gate=gate)
    plan = {path: spec for path, spec in made.plan(passes.adapter.roles()).items() if stage.owns(path)}
    job = Job(passes, made, plan, ExactStream(passes, list(inputs)), sensitivity=sensitivity)
    return Rounding(job, stage, plan, inputs, {})


def divisor(layer):
    return np.random.default_rng(0).uniform(0.5, 2, layer.weight.shape[1]).astype(np.float32)


def test_what_a_recipe_is_compared_with_has_no_part_in_it(block):
    """In a sequential one, whose later layers are rounded for what the earlier ones write, as well."""
    compared, alone = (rounding(block, "gptq+sequential-w3a16", gate).first() for gate in (True, False))
    assert [trial.name for trial in alone] == ["calibrated"]
    assert [trial.name for trial in compared] == ["calibrated", "rtn"]
    for path, layer in alone[0].layers.items():
        np.testing.assert_array_equal(layer.codes(), compared[0].layers[path].codes())


def test_what_is_folded_into_the_model_does_not_stay_there(block):
    passes, stage, _ = block
    before = {name: np.array(value) for name, value in parameters(passes.adapter.module).items()}
    work = rounding(block, "gptq+smoothquant-w8a16")
    work.first()
    linears = passes.adapter.layers()
    names = [edge.consumers[0] for edge in passes.adapter.edges() if edge.folds and stage.owns(edge.consumers[0])]
    trial = work.transformed("divided", {name: Transform(divisor(linears[name])) for name in names})
    adaln = next(path for path in trial.layers if "adaLN" in path)
    assert np.abs(np.array(trial.layers[adaln].dequantized()) - before[f"{adaln}.weight"]).max() > 0.1  # it was folded
    for name, value in parameters(passes.adapter.module).items():
        np.testing.assert_array_equal(np.array(value), before[name])


def test_layers_do_while_they_run_what_nothing_could_absorb(block):
    """Behind a GELU channels can be neither divided nor mixed in advance."""
    passes, stage, inputs = block
    work = rounding(block, "gptq+smoothquant+rotation-w8a16")
    work.first()
    wanted = Transform(divisor(passes.adapter.layers()[FC2]), block=4)
    trial = work.transformed("divided and rotated", {FC2: wanted})
    x = np.random.default_rng(1).standard_normal((5, len(wanted.divisor))).astype(np.float32)
    np.testing.assert_allclose(np.array(trial.layers[FC2].transformed(mx.array(x))), wanted.inputs(x), atol=1e-5)
    exact = passes.through(stage, inputs)
    with swapped(passes.adapter.module, trial.modules):
        assert stage_error(passes.through(stage, inputs), exact) < 1e-3


def test_moments_are_of_the_noise_levels_where_errors_cost_something(block):
    """Costs at one noise level of three alone, relative to their mean: its inputs count three times, others not."""
    passes, stage, inputs = block
    levels = np.unique(np.float32(passes.sigmas))
    costs = np.zeros((len(levels), passes.adapter.layers()[FC2].weight.shape[0]))
    costs[1] = 5.0
    trial, *_ = rounding(block, "gptq+learned-w4a16", sensitivity=Sensitivity(levels, {}, {FC2: costs})).first()
    seen = []
    for index, sigma in enumerate(passes.sigmas):
        if np.float32(sigma) == levels[1]:
            with passes.at(index), tapped(passes.adapter.module, [FC2], lambda path, x: seen.append(np.array(x))):
                mx.eval(stage.run(inputs[index]))
    x = np.concatenate([rows.reshape(-1, rows.shape[-1]) for rows in seen]).astype(np.float64)
    np.testing.assert_allclose(trial.goals[FC2].moments.parts[0].gram, len(levels) * x.T @ x, rtol=1e-4, atol=1e-3)
