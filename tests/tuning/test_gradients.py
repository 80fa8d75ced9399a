"""Gradients of what is tuned against differences of the loss on the twins, and twins against the layers."""

import mlxquant as mq  # before mlx

# isort: split
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.layers.embeddings import QuantizedEmbedding
from mlxquant.layers.kinds import find_layers
from mlxquant.recipes.tuning import Tuning
from mlxquant.tuning.backward import Twins
from mlxquant.tuning.kept import Kept
from mlxquant.tuning.pictures import Pictures
from mlxquant.tuning.text import Text
from mlxquant.tuning.tune import Tuner, know_targets

from support.kinds_chain import Kinds
from support.tiny_pictures import tiny_adapter

FEW = Tuning(iterations=1, batch=4, prompts=4)


def tuner(model, recipe, tuning=FEW, steps=3, cfg=None):
    """A quantized model, what it is tuned for, and its twins."""
    calib = mq.calibrate(model, 4, steps=steps, cfg=cfg)
    adapter = mq.quantize(model, calib, recipe).adapter
    objective = Pictures(model.diffusion, calib, tuning)
    know_targets(objective, tuning, Kept(None, ""))
    layers = find_layers(adapter.module)
    return Tuner(adapter, objective, tuning), Twins(adapter, layers, {path: [path] for path in layers}), objective


def loss_at(tuner_, twins, group, objective):
    predicted = [twins.forward(state, sigma).predicted for state, sigma in objective.passes(group)]
    return float(np.array(objective.loss(group, predicted)))


def directional(work, twins, group, objective, names, size=0.005):
    """The slope of some numbers along the steepest signs: told, and by differences."""
    start = dict(twins.numbers)
    slopes = work.slopes(twins, group)
    way = {name: mx.sign(slopes[name]) for name in names}
    told = sum(float(np.array(mx.abs(slopes[name]).sum())) for name in names)
    found = []
    for step in (size, -size):
        twins.numbers.update({name: start[name] + step * way[name] for name in names})
        found.append(loss_at(work, twins, group, objective))
    twins.numbers.update(start)
    return told, (found[0] - found[1]) / (2 * size)


@pytest.mark.parametrize("recipe", ["rtn-w3a16", "rtn-w4a16-g32", "rtn+svd2-w3a16", "rtn+smoothquant+rotation-w3a16"])
def test_slopes_are_those_of_the_loss(tiny, recipe):
    work, twins, objective = tuner(tiny, recipe)
    group = objective.groups(objective.minibatch(0))[0]
    with twins.installed():
        for what in ("scale", "offset", "bias"):
            names = [name for name in twins.numbers if name.endswith("/" + what)]
            if names:
                told, measured = directional(work, twins, group, objective, names)
                assert told == pytest.approx(measured, rel=0.03), what


def test_every_kind_of_layers_has_slopes():
    model = mq.Model(Kinds())
    work, twins, objective = tuner(model, "rtn+embeddings-w4a16")
    group = objective.groups(objective.minibatch(0))[0]
    with twins.installed():
        by_layer = {name.rpartition("/")[0] for name in twins.numbers}
        assert {"levels", "grouped", "up", "experts", "context"} <= by_layer
        for path in sorted(by_layer):
            told, measured = directional(work, twins, group, objective, [f"{path}/scale"], 2e-4)  # routers jump
            assert told == pytest.approx(measured, rel=0.03, abs=1e-4), path


@pytest.mark.parametrize("recipe", ["rtn-w4a8", "rtn-w4a8-token", "rtn+embeddings-w4a16", "rtn-w4a16-tensor"])
def test_twins_are_the_layers(recipe):
    """Whatever a recipe does, at 0 a twin is the function of its layer."""
    for model in (mq.Model(Kinds()), mq.Model(tiny_adapter())):
        if "tensor" in recipe and isinstance(model.adapter, Kinds):
            continue  # layers of several parts have no scale a tensor
        if "embeddings" in recipe and not isinstance(model.adapter, Kinds):
            continue
        work, twins, _ = tuner(model, recipe)
        wanted = work.held_out()
        with twins.installed():
            assert work.held_out() == pytest.approx(wanted, rel=1e-3)


def test_a_table_that_is_the_output_layer_too_has_the_slopes_of_both():
    model = mq.load("gpt-python")
    calib = mq.calibrate_text(model, samples=3, length=16)
    adapter = mq.quantize(model, calib, "rtn+embeddings-w3a16").adapter
    objective = Text(model.language, calib, FEW)
    know_targets(objective, FEW, Kept(None, ""))
    layers = find_layers(adapter.module)
    work, twins = Tuner(adapter, objective, FEW), Twins(adapter, layers, {path: [path] for path in layers})
    (table,) = [path for path, layer in layers.items() if isinstance(layer, QuantizedEmbedding) and "wte" in path]
    with twins.installed():
        told, measured = directional(work, twins, [0, 1], objective, [f"{table}/scale"])
        assert told == pytest.approx(measured, rel=0.03)


def test_steps_of_inputs_have_the_slopes_of_learned_step_sizes(tiny):
    """LSQ's rule, where the loss is a plain sum: rounded less exact inside of the range, the edge outside."""
    work, twins, objective = tuner(tiny, "rtn-w8a4")
    with twins.installed():
        slopes = work.slopes(twins, objective.groups(objective.minibatch(0))[0])
    steps = {name: slope for name, slope in slopes.items() if name.endswith("/step")}
    assert steps
    assert all(np.isfinite(np.array(slope)).all() for slope in steps.values())
    assert max(float(np.abs(np.array(slope)).max()) for slope in steps.values()) > 0
    path = next(iter(steps)).rpartition("/")[0]
    layer = find_layers(work._adapter.module)[path]
    table = layer.table
    x = mx.array(np.random.default_rng(1).normal(size=(1, 5, layer.width)).astype(np.float32) * 8 * table.step[1])
    twin = twins._twins[path]

    def summed(step):
        twins.numbers[f"{path}/step"] = step
        return twin._rounded(x).sum()

    before = dict(twins.numbers)
    with work._adapter.clock.at(float(table.sigma[1])):
        told = np.array(mx.grad(summed)(before[f"{path}/step"]))
    twins.numbers.update(before)
    u = (np.array(x, np.float64) - table.shift[1]) / table.step[1]
    inside = (u >= -8.5) & (u <= 7.5)
    wanted = np.where(inside, np.rint(u) - u, np.clip(np.rint(u), -8, 7)).sum() * table.step[1]
    np.testing.assert_allclose(told[1], wanted, rtol=1e-3)
    assert told[0] == told[2] == 0


def test_sides_that_run_apart_have_the_same_slopes(tiny):
    """Where memory holds no two rows, both sides of a guided picture run one after the other."""
    work, twins, objective = tuner(tiny, "rtn-w3a16", cfg=2.0)
    (group,) = objective.groups(objective.minibatch(0))
    with twins.installed():
        together = work.slopes(twins, group)
        tiny.adapter.rows = 1
        groups = objective.groups(group)
        assert len(groups) == len(group)
        assert len(objective.passes(groups[0])) == 2
        apart = [work.slopes(twins, one) for one in groups]
    for name, slope in together.items():
        summed = sum(np.array(one[name]) for one in apart)
        np.testing.assert_allclose(summed, np.array(slope), rtol=2e-3, atol=2e-4 * float(np.abs(summed).max() + 1e-9))


def test_the_loss_is_the_guided_error_and_a_share_of_each_side(tiny):
    tuning = replace(FEW, branches=0.5)
    _, _, objective = tuner(tiny, "rtn-w3a16", tuning, cfg=3.0)
    group = objective.groups(objective.minibatch(0))[0]
    rng = np.random.default_rng(0)
    shape = (2 * len(group), *tiny.diffusion.latent_shape)
    made = rng.normal(size=shape).astype(np.float32)
    wanted = np.array(objective._targets)[[objective._known[one] for one in group]].swapaxes(0, 1)
    e_c, e_u = made.reshape(2, len(group), *shape[1:]) - wanted
    guided = e_u + 3 * (e_c - e_u)
    each = (guided**2 + 0.5 * (e_c**2 + e_u**2)).reshape(len(group), -1).mean(1)
    steps = np.diff(tiny.diffusion.sigmas(3)) ** 2
    weights = steps / steps.mean()
    told = float(np.array(objective.loss(group, [{"velocity": mx.array(made)}])))
    assert told == pytest.approx(sum(each * [weights[step] for _, step, _ in group]), rel=1e-4)
