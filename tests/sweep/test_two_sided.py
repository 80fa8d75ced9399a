"""By which Hessian layers are rounded: what it is made of, how it is chosen, and what the result says of it."""

import mlxquant as mq  # before mlx

# isort: split
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.api.plan import plan
from mlxquant.calibration.trajectories import collect
from mlxquant.curvature.factors import Factors, LayerCurvature, measure
from mlxquant.layers.kinds import find_layers
from mlxquant.layers.tree import get_module, swapped
from mlxquant.models.edges import Fold
from mlxquant.numerics.moments import Moments
from mlxquant.numerics.part_moments import PartMoments
from mlxquant.numerics.transform import Transform
from mlxquant.recipes.recipe import TwoSided
from mlxquant.sweep import two_sided
from mlxquant.sweep.layer import quantize_layer
from mlxquant.sweep.two_sided import CANDIDATES, KIND, ONE_SIDED, Candidate, aimed, choose, outputs_of
from models.recorded.test_chain import inputs, recorded

from support import anybody
from support.anybody import seeded
from support.killed_sweep import killed_after
from support.kinds_chain import Kinds
from support.synthetic_chain import Chain
from support.tiny_language import TEXT, gpt_folder

A, B = (TwoSided(sketch, 0.5) for sketch in "AB")


def grams(seed, *sizes):
    random = np.random.default_rng(seed)
    rows = [random.normal(size=(3 * size, size)).astype(np.float32) * (place + 1) for place, size in enumerate(sizes)]
    return [values.T @ values for values in rows]


@pytest.fixture
def known():
    gram, first, second, out, other = grams(0, 8, 8, 8, 4, 4)
    return LayerCurvature(gram, 24, {"A": Factors(first, out), "B": Factors(second, other)})


def unit(gram):
    return gram / np.diagonal(gram).mean()


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_inputs_are_between_plain_and_weighed(known, share):
    """Each over its mean diagonal; no share of the gradients leaves the moments of the inputs as they are."""
    (gram,) = grams(5, 8)
    moments = Moments(gram, 24, 2 * gram)
    for sketch in "AB":
        aim = aimed(moments, known, TwoSided(sketch, share))
        wanted = (1 - share) * unit(gram) + share * unit(known.factors[sketch].inputs) if share else gram
        np.testing.assert_allclose(aim.gram, wanted, rtol=1e-5)
        np.testing.assert_allclose(aim.outputs, unit(known.factors[sketch].outputs), rtol=1e-6)
        assert (aim.count, aim.gram.dtype, aim.outputs.dtype) == (24, np.float32, np.float32)
        np.testing.assert_array_equal(aim.cross, moments.cross)
    assert moments.outputs is None  # errors are told by the moments themselves


def test_without_a_hessian_moments_are_those_of_the_inputs(known):
    moments = Moments(*grams(5, 8), 24)
    nothing = LayerCurvature(known.gram, 24, {})
    for found, way in ((None, A), (known, None), (known, ONE_SIDED), (nothing, B)):
        assert aimed(moments, found, way) is moments


def test_what_a_layer_does_to_its_inputs_is_done_to_the_factor(known):
    """Sketches have seen the inputs as they came."""
    online = Transform(divisor=np.arange(1.0, 9), block=4)
    moments = online.moments(Moments(*grams(5, 8), 24))
    aim = aimed(moments, known, TwoSided("A", 1), online)
    rows = np.linalg.cholesky(known.factors["A"].inputs.astype(np.float64)).T  # rowsᵀ rows is the factor
    moved = online.inputs(rows)
    np.testing.assert_allclose(aim.gram, unit(moved.T @ moved), rtol=1e-4, atol=1e-5)


def test_rows_that_write_something_else_have_other_errors(known):
    """A Hessian of gradients is moved as its gradients are."""
    slopes = np.random.default_rng(3).normal(size=(30, 8))
    whole = Factors(known.gram, slopes.T @ slopes)
    divided, mixed = Transform(divisor=np.array([2.0, 3, 5, 7])), Transform(order=np.array([2, 0, 3, 1]), block=4)
    moved = slopes.copy()
    moved[:, :4], moved[:, 4:] = divided.slopes(slopes[:, :4]), mixed.slopes(slopes[:, 4:])
    found = outputs_of(whole, [(slice(0, 4), divided), (slice(4, 8), mixed)])
    np.testing.assert_allclose(found, moved.T @ moved, rtol=1e-10)
    np.testing.assert_array_equal(whole.outputs, slopes.T @ slopes)  # the factors stay as they are
    assert outputs_of(whole, []) is whole.outputs


def test_rows_that_were_folded_have_the_factor_of_the_folded_model():
    """A divisor between the blocks' layers: what writes is divided, what reads multiplied, and then measured anew."""

    class Stream(Chain):
        """``blocks.1`` reads what ``blocks.0`` writes, and nothing else does."""

        def _block(self, index, state):
            x = self.module.blocks[index](state["image"])
            return state | {"image": x if index == 0 else mx.maximum(x, 0)}

    def outputs(adapter):
        probes = collect(Stream(blocks=2, width=8, side=2), exact.prompts("calibration", 3), 2, 2.0).probes(adapter)
        found = measure(adapter, probes, seed=4).of_stage(adapter, adapter.stages[1], ["blocks.0"])["blocks.0"]
        return found.factors["B"]

    exact, folded = Stream(blocks=2, width=8, side=2), Stream(blocks=2, width=8, side=2)
    divisor = 2.0 ** np.arange(-4.0, 4.0)
    write, read = folded.module.blocks
    write.weight, read.weight = write.weight / mx.array(divisor)[:, None], read.weight * mx.array(divisor)
    moved = outputs_of(outputs(exact), [(slice(0, 8), Transform(divisor=divisor))])
    np.testing.assert_allclose(outputs(folded).outputs, moved, rtol=1e-4, atol=1e-5 * moved.max())
    assert Fold("blocks.0", 0, 8).stop == 8  # what ``sweep.rounding`` makes slices of


def pictures(recipe="kron-w4a16", prompts=4):
    model = mq.Model(Chain(blocks=2, width=16, side=4))
    calib = mq.calibrate(model, prompts=prompts, steps=2)
    return model.adapter, calib, plan(model, mq.parse_recipe(recipe))


def test_the_least_error_on_held_out_samples_is_chosen(monkeypatch):
    """Of all Hessians, and of the best of them with steps that clip nothing."""
    monkeypatch.setattr(two_sided, "FEWEST", 99)
    adapter, calib, layers = pictures("kron-w3a16")
    chosen = choose(adapter, calib, layers)
    errors, names = chosen.facts["errors"], [str(one) for one in CANDIDATES]
    first = min(names, key=errors.get)
    assert list(errors) == [*names, f"{first}, unclipped", f"{first}, regrid"]
    assert chosen.facts["chosen"] == min(errors, key=errors.get)
    assert chosen.facts["layers"] == len(layers)
    assert chosen.facts["rows"] == {"gradients": 3 * 2 * 2, "held_out": 2 * 2}
    (way,) = {spec.two_sided for spec in chosen.plan.values()}
    assert str(way) == first
    steps = {(spec.steps, spec.refine) for spec in chosen.plan.values()}
    wanted = {"unclipped": ("extremes", None), "regrid": ("search", "regrid")}
    assert steps == {wanted.get(chosen.facts["chosen"].rpartition(", ")[2], ("search", None))}
    assert {p: replace(s, two_sided=None, steps="search", refine=None) for p, s in chosen.plan.items()} == layers


def test_errors_are_those_of_the_model_with_the_rounded_layers(monkeypatch):
    """Of GPTQ's candidate, by quantizing all of it: plain inputs, each layer for itself."""
    monkeypatch.setattr(two_sided, "FEWEST", 99)
    adapter, calib, opened = pictures("kron-w4a16")
    found = choose(adapter, calib, opened, candidates=[Candidate(ONE_SIDED)]).facts["errors"][str(ONE_SIDED)]
    layers, curvature = pictures("gptq-w4a16")[2], measure(adapter, calib.probes(adapter))
    modules = {}
    for stage in adapter.stages:
        for path, seen in curvature.of_stage(adapter, stage, [p for p in layers if stage.owns(p)]).items():
            one = PartMoments.one(Moments(seen.gram, seen.tokens))
            modules[path] = quantize_layer(get_module(adapter.module, path), layers[path], one, path, Transform()).layer
    held, wanted = calib.probes(adapter, held_out=True), 0.0
    for sigma, state in zip(held.sigmas, held.states, strict=True):
        exact = adapter.run(state, sigma)["velocity"]
        with swapped(adapter.module, modules):
            wrong = np.array(adapter.run(state, sigma)["velocity"] - exact, np.float64).reshape(-1, 2, exact[0].size)
        guided = 2 * wrong[:, 0] - wrong[:, 1]
        wanted += (np.square(guided).mean(1) + 0.25 * np.square(wrong).mean(2).sum(1)).sum()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert found > 0


@pytest.mark.parametrize(("errors", "best"), [([3, 2, 1, 4], 2), ([1, 2, 3, 4], 0), ([np.nan, 2, np.inf, 1], 3)])
@pytest.mark.parametrize(("steps", "taken"), [([0.5, 7], "extremes"), ([7, 9], "search"), ([np.nan, 0.5], "regrid")])
def test_what_is_not_finite_is_not_chosen(monkeypatch, errors, best, steps, taken):
    adapter, calib, layers = pictures()
    answers = iter([np.array(errors, float), np.array(steps)])
    monkeypatch.setattr(two_sided, "_errors", lambda *given: next(answers))
    chosen = choose(adapter, calib, layers)
    wanted = replace(CANDIDATES[best], steps=taken)
    assert chosen.facts["chosen"] == str(wanted)
    assert all(map(np.isfinite, chosen.facts["errors"].values()))
    found = {(spec.two_sided, spec.steps, spec.refine) for spec in chosen.plan.values()}
    kept = {"extremes": ("extremes", None), "search": ("search", None), "regrid": ("search", "regrid")}
    assert found == {(wanted.two_sided, *kept[taken])}
    assert (chosen.curvature is None) == (wanted.two_sided == ONE_SIDED)


def test_recipes_that_refine_are_tried_without_and_their_steps_stay(monkeypatch):
    tried = []

    def watched(module, spec, *given, real=two_sided.quantize_layer):
        tried.append(spec.refine)
        return real(module, spec, *given)

    monkeypatch.setattr(two_sided, "quantize_layer", watched)
    adapter, calib, layers = pictures("kron+regrid-w4a16")
    chosen = choose(adapter, calib, layers)
    assert set(tried) == {None}
    assert list(chosen.facts["errors"]) == [str(one) for one in CANDIDATES]
    assert {(spec.steps, spec.refine) for spec in chosen.plan.values()} == {("search", "regrid")}


def test_a_third_of_the_stages_is_tried(monkeypatch):
    adapter, _, layers = pictures()
    stages = [stage for stage in adapter.stages if any(map(stage.owns, layers))]
    monkeypatch.setattr(two_sided, "FEWEST", 1)
    tried = two_sided._tried(adapter, list(layers))
    assert len(tried) == max(1, len(stages) // 3) < len(stages)
    monkeypatch.setattr(two_sided, "FEWEST", 99)
    assert list(two_sided._tried(adapter, list(layers))) == stages


def test_steps_that_are_named_stay(monkeypatch):
    adapter, calib, layers = pictures("kron+mse-w4a16")
    chosen = choose(adapter, calib, layers)
    assert list(chosen.facts["errors"]) == [str(one) for one in CANDIDATES]
    assert {spec.steps for spec in chosen.plan.values()} == {"mse"}


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("no gradient"), ValueError("[vjp] none")])
def test_without_a_gradient_rounding_is_one_sided_and_says_why(monkeypatch, error):
    def fails(*given, **more):
        raise error

    adapter, calib, layers = pictures()
    monkeypatch.setattr(two_sided, "measure", fails)
    chosen = choose(adapter, calib, layers)
    assert chosen.facts == {"chosen": "one-sided", "without_gradient": str(error)}
    assert {spec.two_sided for spec in chosen.plan.values()} == {ONE_SIDED}
    assert chosen.curvature is None


def test_a_choice_is_kept_for_its_recipe(tmp_path, monkeypatch):
    adapter, calib, layers = pictures()
    first = choose(adapter, calib, layers, work=tmp_path)
    assert (tmp_path / f"{KIND}.json").exists()
    compared = []

    def watched(*given, real=two_sided._compared):
        compared.append(1)
        return real(*given)

    monkeypatch.setattr(two_sided, "_compared", watched)
    again = choose(adapter, calib, layers, work=tmp_path)
    assert (again.facts, again.plan) == (first.facts, first.plan)
    assert not compared
    other = pictures("kron-w2a16")[2]
    assert choose(adapter, calib, other, work=tmp_path).facts["errors"] != first.facts["errors"]
    assert len(compared) == 1


def test_a_named_hessian_is_taken():
    adapter, calib, layers = pictures("kron+sketchB25-w4a16")
    chosen = choose(adapter, calib, layers)
    assert chosen.plan == layers
    assert chosen.facts == {}
    assert chosen.curvature is not None


def test_large_models_try_some_of_their_stages(monkeypatch):
    adapter, calib, layers = pictures()
    monkeypatch.setattr(two_sided, "TRIED", 200)
    chosen = choose(adapter, calib, layers)
    assert 0 < chosen.facts["layers"] < len(layers)
    assert len(chosen.plan) == len(layers)
    assert {spec.two_sided is None for spec in chosen.plan.values()} == {False}


def assert_tells(qmodel, folder):
    """The facts say what was chosen, and so does what is saved."""
    facts = qmodel.facts[KIND]
    assert facts["chosen"] == min(facts["errors"], key=facts["errors"].get)
    qmodel.save(folder)
    again = mq.load(str(folder))
    assert again.facts[KIND] == facts
    assert again.facts["recipe"]["name"] == qmodel.facts["recipe"]["name"]
    for path, layer in qmodel.layers.items():
        np.testing.assert_array_equal(again.layers[path].codes(), layer.codes())


PICTURES = [
    "kron-w4a16",
    "kron+smoothquant+rotation-w4a8",
    "kron+corrected-w4a16",
    "kron+mixed-w4a16",
]


@pytest.mark.parametrize("recipe", PICTURES)
def test_pictures(tiny, tmp_path, recipe):
    qmodel = mq.quantize(tiny, mq.calibrate(tiny, prompts=2, steps=2), recipe)
    assert_tells(qmodel, tmp_path / "saved")


def test_text(tmp_path):
    model = mq.load(gpt_folder(tmp_path / "gpt"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    qmodel = mq.quantize(model, mq.calibrate_text(model, text, samples=9, length=16), "kron-w3a16-g64")
    assert_tells(qmodel, tmp_path / "saved")


def test_recorded_modules():
    module = seeded(anybody.Conditioned)
    seen = recorded(module, *inputs(anybody.Conditioned))
    report = mq.quantize_module(module, seen, "kron-w3a16")
    assert find_layers(module)
    assert report.sizes.layers


@pytest.mark.parametrize("recipe", ["kron-w3a16", "kron+sketchA50+smoothquant+rotation-w4a8"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, recipe):
    model = mq.Model(Chain(blocks=2, width=16, side=4))
    calib = mq.calibrate(model, prompts=2, steps=2)
    files = []
    for killed in (False, True):
        work = tmp_path / f"work{killed}"
        if killed:
            with killed_after(2):
                mq.quantize(model, calib, recipe, work=work)
        qmodel = mq.quantize(model, calib, recipe, work=work)
        qmodel.save(tmp_path / f"{killed}")
        files.append({path.name: path.read_bytes() for path in sorted((tmp_path / f"{killed}").iterdir())})
    assert files[0] == files[1]


def test_layers_that_are_left_alone_are_told():
    """Of several parts, tables, and those that nothing hangs on."""
    model = mq.Model(Kinds(side=4))
    calib = mq.calibrate(model, prompts=2, steps=2)
    done = mq.quantize(model, calib, "kron+sketchA50+embeddings-w4a16")
    told = {path for stage in done.facts["stages"] for path, one in stage["layers"].items() if one.get("one_sided")}
    assert told == {"grouped", "experts", "levels"}
    assert set(done.facts["left_undone"]["two-sided rounding"]) == told
    assert "left_undone" not in mq.quantize(model, calib, "gptq-w4a16").facts


def test_a_layer_that_nothing_hangs_on_is_told():
    class Idle(Chain):
        def _head(self, state):
            return super()._head(state | {"image": 0 * state["image"]})

    model = mq.Model(Idle(blocks=1, width=16, side=4))
    done = mq.quantize(model, mq.calibrate(model, prompts=2, steps=2), "kron+sketchB50-w4a16")
    told = {path for stage in done.facts["stages"] for path, one in stage["layers"].items() if one.get("one_sided")}
    assert told >= {"embed", "context", "blocks.0"}
