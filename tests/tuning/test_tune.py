"""Tuned scales end to end: never worse on what is held out, resumed to the same bytes, and on any kind of model."""

import mlxquant as mq  # before mlx

# isort: split
from dataclasses import replace
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.errors import CalibrationError, RecipeError
from mlxquant.layers.kinds import find_layers
from mlxquant.layers.tree import parameters
from mlxquant.progress import silent
from mlxquant.recipes.recipe import Recipe
from mlxquant.recipes.tuning import Tuning
from mlxquant.tuning import tune as tuning_module
from mlxquant.tuning.pictures import Pictures, trajectories
from mlxquant.tuning.tune import Run, Tuner

from support.same_layers import assert_same

SHORT = {"iterations": 12, "batch": 4, "prompts": 4, "rate": 5e-3}


def recipe_of(name, **changes):
    recipe = mq.parse_recipe(name)
    return replace(recipe, tuning=replace(recipe.tuning, **{**SHORT, **changes}))


@pytest.fixture
def calib(tiny):
    return mq.calibrate(tiny, 4, steps=3, cfg=2.0)


def test_recipes_say_so_only_where_they_are_tuned():
    plain, tuned = mq.parse_recipe("gptq-w4a16"), mq.parse_recipe("gptq+tuned64-w4a16")
    assert plain.tuning is None
    assert "tuning" not in plain.to_dict()
    assert tuned.tuning == Tuning(group=64)
    assert Recipe.from_dict(plain.to_dict()) == plain
    assert Recipe.from_dict(tuned.to_dict()) == tuned
    newer = tuned.to_dict() | {"tuning": {"colour": 1}}
    with pytest.raises(RecipeError, match="a saved recipe sets colour"):
        Recipe.from_dict(newer)
    with pytest.raises(RecipeError, match="tuned scales: group = 48 is out of range"):
        Tuning(group=48)


@pytest.mark.parametrize("name", ["rtn+tuned-w3a16", "rtn+tuned-w2a16-g32", "rtn+tuned32-w3a16", "rtn+tuned-w4a8"])
def test_codes_stay_and_the_held_out_loss_falls(tiny, calib, name):
    plain = mq.quantize(tiny, calib, name.replace("+tuned32", "").replace("+tuned", ""))
    done = mq.quantize(tiny, calib, recipe_of(name))
    facts = done.facts["tuning"]
    assert facts["kept"]
    assert facts["loss_after"] < facts["loss_before"]
    for path, layer in plain.layers.items():
        np.testing.assert_array_equal(layer.codes(), done.layers[path].codes())
    if "32" not in name.split("-")[0]:
        assert done.size.model_bytes == plain.size.model_bytes
    else:
        formats = {str(layer.format) for layer in done.layers.values()}
        assert facts["widened"]
        assert formats == {"w3-g32", "w8"}


def test_what_does_not_help_is_not_kept(tiny, calib, monkeypatch):
    """The judge of the twins is fooled, and the one of the layers that run is not."""
    monkeypatch.setattr(Run, "judged", lambda self, loss: self.losses.append(loss))

    def away(self, twins, run):
        run.numbers = {name: value + 0.3 for name, value in run.numbers.items()}
        run.best, run.iteration = run.numbers, run.iteration + 1

    monkeypatch.setattr(Tuner, "step", away)
    plain = mq.quantize(tiny, calib, "rtn-w3a16")
    done = mq.quantize(tiny, calib, recipe_of("rtn+tuned32-w3a16"))
    assert not done.facts["tuning"]["kept"]
    assert_same(plain.layers, done.layers)


def test_no_iterations_are_the_same_layers(tiny, calib):
    plain = mq.quantize(tiny, calib, "gptq-w4a8")
    done = mq.quantize(tiny, calib, recipe_of("gptq+tuned-w4a8", iterations=0))
    assert_same(plain.layers, done.layers)
    facts = done.facts["tuning"]
    assert not facts["kept"]
    assert facts["loss_before"] == facts["loss_after"]


def test_a_run_without_progress_ends(tiny, calib, monkeypatch):
    monkeypatch.setattr(Tuner, "held_out", lambda self: 1.0)
    done = mq.quantize(tiny, calib, recipe_of("rtn+tuned-w3a16", iterations=120))
    assert done.facts["tuning"]["iterations"] == 10 * tuning_module.PATIENCE * (tuning_module.SLOWED + 1)


@pytest.mark.parametrize("at", [0, 3, 7])
def test_killed_and_resumed_is_the_same_bytes(tiny, calib, tmp_path, monkeypatch, at):
    recipe = recipe_of("rtn+tuned-w3a16")
    wanted = mq.quantize(tiny, calib, recipe)
    monkeypatch.setattr("mlxquant.tuning.kept.INTERVAL", 0.0)
    step = Tuner.step

    def dies(self, twins, run):
        if run.iteration == at:
            raise KeyboardInterrupt
        step(self, twins, run)

    monkeypatch.setattr(Tuner, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        mq.quantize(tiny, calib, recipe, work=tmp_path)
    steps, made = [], Pictures.targets

    def counted(self, twins, run):
        steps.append(run.iteration)
        step(self, twins, run)

    monkeypatch.setattr(Tuner, "step", counted)
    monkeypatch.setattr(Pictures, "targets", lambda self, *args: pytest.fail("made again") or made)
    done = mq.quantize(tiny, calib, recipe, work=tmp_path)
    assert steps == list(range(at, 12))
    assert_same(wanted.layers, done.layers)
    assert done.facts["tuning"] == wanted.facts["tuning"]
    monkeypatch.setattr(Tuner, "step", dies)  # finished, it does nothing again
    assert_same(wanted.layers, mq.quantize(tiny, calib, recipe, work=tmp_path).layers)


def test_more_prompts_are_drawn_where_there_are_few(tiny, calib):
    drawn = trajectories(tiny.diffusion, calib, Tuning(prompts=7), silent, None)
    assert len(drawn.prompts) == 7
    assert drawn.latents.shape[:2] == (3, 7)
    assert len({prompt.text for prompt in drawn.prompts}) == 7
    np.testing.assert_array_equal(np.array(drawn.latents[:, :4]), np.array(calib.latents))
    (alone,) = drawn.prompts[5:6]
    again = mq.calibrate(tiny, [alone], steps=3, cfg=2.0)
    np.testing.assert_allclose(np.array(drawn.latents[:, 5]), np.array(again.latents[:, 0]), atol=1e-5)
    assert len(trajectories(tiny.diffusion, calib, Tuning(prompts=2), silent, None).prompts) == 4


def test_nothing_is_learned_from_what_is_held_out(tiny, calib):
    objective = Pictures(tiny.diffusion, calib, Tuning(**SHORT, held_out=0.25), calib)
    held = {picture for _, _, picture in objective.held_out}
    drawn = [sample for iteration in range(20) for sample in objective.minibatch(iteration)]
    assert held == {3}
    assert {picture for _, _, picture in drawn} == {0, 1, 2}
    assert {step for _, step, _ in drawn} == {0, 1, 2}
    assert {source for source, _, _ in drawn} == {0, 1}
    assert objective.minibatch(5) == objective.minibatch(5) != objective.minibatch(6)
    with pytest.raises(CalibrationError, match="found 1 prompts in all"):
        Pictures(tiny.diffusion, calib.part(pictures=slice(1)), Tuning())


def test_learning_from_what_the_quantized_model_draws(tiny, calib):
    done = mq.quantize(tiny, calib, recipe_of("rtn+tuned-w3a16", on_policy=True))
    assert done.facts["tuning"]["on_policy"]
    assert done.facts["tuning"]["kept"]


def test_saved_and_loaded_it_predicts_the_same(tiny, calib, tmp_path):
    done = mq.quantize(tiny, calib, recipe_of("rtn+tuned32-w3a16"))
    again = mq.load(str(done.save(tmp_path / "model")))
    assert_same(done.layers, again.layers)
    assert again.facts["tuning"] == done.facts["tuning"]
    prompts = tiny.diffusion.prompts("evaluation", 2)
    np.testing.assert_array_equal(done.images(prompts, 3), again.images(prompts, 3))


def test_text():
    model = mq.load("gpt-python")
    calib = mq.calibrate_text(model, samples=8, length=32)
    plain = mq.quantize(model, calib, "rtn-w3a16")
    done = mq.quantize(model, calib, recipe_of("rtn+tuned-w3a16", held_out=0.25, iterations=6))
    facts = done.facts["tuning"]
    assert facts["kept"]
    assert (facts["windows"], facts["held_out_windows"]) == (6, 2)
    tokens = mx.array(calib.windows[6:])

    def divergence(other):
        p, q = (nn.log_softmax(one.adapter.logits(tokens), -1) for one in (model, other))
        return float(np.array((mx.exp(p) * (p - q)).sum(-1).mean()))

    assert divergence(plain) == pytest.approx(facts["loss_before"], rel=1e-3)
    assert divergence(done) == pytest.approx(facts["loss_after"], rel=1e-3)


class Net(nn.Module):
    """A chain that returns two arrays."""

    def __init__(self):
        super().__init__()
        self.blocks = [nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32)) for _ in range(2)]

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(x)
        return {"sample": x, "twice": 2 * x}


def recorded(calls=6):
    mx.random.seed(3)
    net = Net()
    inputs = [mx.random.normal((2, 5, 32)) for _ in range(calls)]
    with mq.recording(net) as seen:
        answers = [net(x) for x in inputs]
    return net, seen, inputs, answers


def test_recorded_calls(tmp_path):
    net, seen, inputs, answers = recorded()
    report = mq.quantize_module(net, seen, recipe_of("rtn+tuned-w3a16"), work=tmp_path)
    facts = report.facts["tuning"]
    assert facts["kept"]
    assert (facts["calls"], facts["held_out_calls"]) == (5, 1)
    scale = np.mean([np.mean(np.array(one["sample"]) ** 2) for one in answers])
    wrong = np.mean((np.array(net(inputs[-1])["sample"]) - np.array(answers[-1]["sample"])) ** 2)
    assert facts["loss_after"] == pytest.approx(2 * wrong / scale, rel=1e-3)
    other, seen, *_ = recorded()
    mq.quantize_module(other, seen, recipe_of("rtn+tuned-w3a16"), work=tmp_path)  # all of it is kept
    for name, value in parameters(net).items():
        np.testing.assert_array_equal(np.array(value), np.array(parameters(other)[name]))


def test_a_loss_of_ones_own():
    def loss(made, wanted):
        assert set(made) == set(wanted) == {"sample", "twice"}
        return mx.abs(made["sample"] - wanted["sample"]).mean()

    net, seen, inputs, answers = recorded()
    report = mq.quantize_module(net, seen, recipe_of("rtn+tuned-w3a16"), loss=loss)
    wrong = float(np.array(mx.abs(net(inputs[-1])["sample"] - answers[-1]["sample"]).mean()))
    assert report.facts["tuning"]["loss_after"] == pytest.approx(wrong, rel=1e-3)


def test_the_module_is_as_it_was_after_an_error():
    net, seen, *_ = recorded()

    def loss(made, wanted):
        raise KeyError("a mistake")

    with pytest.raises(KeyError):
        mq.quantize_module(net, seen, recipe_of("rtn+tuned-w3a16"), loss=loss)
    assert not find_layers(net)


@pytest.mark.mlxlm
def test_exported_to_mlx_lm_it_predicts_the_same(tmp_path):
    """Scales that only mlxquant's own file has a place for would show here: theirs is a stock ``load``."""
    load = import_module("mlx_lm").load
    model = mq.load("gpt-python")
    calib = mq.calibrate_text(model, samples=8, length=32)
    for name in ("rtn+tuned-w4a16-g64", "rtn+tuned64-w4a16"):
        done = mq.quantize(model, calib, recipe_of(name, iterations=4))
        assert done.facts["tuning"]["kept"]
        mq.export(done, tmp_path / name, "mlx-lm")
        theirs, _ = load(str(tmp_path / name))
        theirs.set_dtype(mx.float32)  # it computes in the 16 bits of its norms, ours in 32
        tokens = mx.array(calib.windows[:2])
        ours = np.array(done.adapter.logits(tokens))
        np.testing.assert_allclose(np.array(theirs(tokens).astype(mx.float32)), ours, atol=2e-4 * np.abs(ours).max())
