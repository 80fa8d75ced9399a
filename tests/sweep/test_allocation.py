"""Mixed precision: limits are met exactly, predictions are of the velocity, and bits go where they buy most."""

import mlxquant as mq  # before mlx

# isort: split
import numpy as np
import pytest

from mlxquant.curvature import sensitivity
from mlxquant.errors import RecipeError
from mlxquant.files import kept_arrays
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.tree import swapped
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sweep import allocation, survey
from mlxquant.sweep.allocation import allocate

from support.tiny_pictures import tiny_adapter

SILENT_END = (  # nothing that it writes reaches the velocity
    "multimodal_transformer_blocks.1.text_transformer_block.attn.q_proj"
)
BLOCK = "multimodal_transformer_blocks.0"


@pytest.fixture(scope="module")
def model():
    return mq.Model(tiny_adapter())


@pytest.fixture(scope="module")
def calib(model):
    return mq.calibrate(model, prompts=4, steps=3)


@pytest.fixture(scope="module")
def mixed(model, calib):
    """At 6 bits a weight and 6 an input."""
    return allocate(model.adapter, calib, parse_recipe("rtn-w4a8"), bits_per_weight=6, bits_per_activation=6)


def roles(model):
    return {path: model.adapter.role(path) for path in model.adapter.layers()}


def test_the_quantized_model_is_as_large_as_was_said(model, calib, mixed):
    quantized = mq.quantize(model, calib, mixed.recipe)
    assert quantized.size.bits_per_quantized_weight == pytest.approx(mixed.facts["bits_per_weight"])
    assert 5.5 < mixed.facts["bits_per_weight"] <= 6
    for path, row in mixed.facts["layers"].items():
        assert str(quantized.layers[path].format) == row["weight"]
        assert quantized.layers[path].nbytes == row["bytes"]


def test_a_recipe_with_branches_keeps_its_size(model, calib):
    quantized = mq.quantize(
        model, calib, allocate(model.adapter, calib, parse_recipe("rtn+svd2-w4a16"), bits_per_weight=7).recipe
    )
    assert 6.5 < quantized.size.bits_per_quantized_weight <= 7


def test_layers_that_the_recipe_gives_eight_bits_keep_them_and_careful_ones_get_at_least_four(model, calib):
    recipe = parse_recipe("rtn-w4a8", ["*.q_proj=w8a8"])
    given, before = allocate(model.adapter, calib, recipe, bits_per_weight=5.5), recipe.plan(roles(model))
    assert given.plan == given.recipe.plan(roles(model))
    careful = {path for path, role in model.adapter.roles().items() if role.careful}
    assert careful
    for path, spec in before.items():
        if path in careful:
            assert path not in given.plan or 4 <= given.plan[path].weight.bits <= 8
        elif spec.weight.bits == 8:
            assert given.plan[path] == spec
    assert {given.plan[path].weight.bits for path in careful if path in given.plan} - {8}
    assert len({spec.weight.bits for spec in given.plan.values()}) > 2


def test_a_layer_of_eight_bits_stays_as_it_is_where_that_is_worth_its_bytes(model, calib):
    roomy = allocate(model.adapter, calib, parse_recipe("rtn-w4a16"), bits_per_weight=12)
    row = roomy.facts["layers"]["final_layer.linear"]
    assert (row["weight"], row["error"]) == (allocation.FULL_PRECISION, 0)
    assert row["bytes"] == model.adapter.layers()["final_layer.linear"].weight.nbytes
    assert "final_layer.linear" not in roomy.plan
    assert sum(one["bytes"] for one in roomy.facts["layers"].values()) * 8 <= 12 * sum(
        layer.weight.size for layer in model.adapter.layers().values()
    )
    quantized = mq.quantize(model, calib, roomy.recipe)
    assert set(quantized.layers) == set(roomy.plan)
    assert quantized.size.bits_per_quantized_weight <= 12


def test_nothing_is_spent_where_no_error_arrives(mixed):
    assert mixed.facts["layers"][SILENT_END]["weight"] == "w2"
    assert mixed.facts["layers"][SILENT_END]["error"] == 0


def test_more_bytes_never_predict_more_error_and_uniform_is_beaten_at_its_size(model, calib):
    recipe = parse_recipe("rtn-w4a16")
    own = allocate(model.adapter, calib, recipe).facts
    assert own["error"] == own["error_before"]
    limits = [own["bits_per_weight"] + more for more in (-0.3, 1e-9)]
    tight, same = (allocate(model.adapter, calib, recipe, limit).facts["error"] for limit in limits)
    assert tight > same
    assert same < own["error"]


def test_the_predicted_error_is_that_of_the_velocity(model, calib):
    """One layer at a time in 4 bits, measured on the whole calibration set. In the last layer nothing is left to
    estimate. Inside the model the prediction is to first order and takes errors of tokens as independent: what they
    have in common adds up to more.
    """
    facts = allocate(model.adapter, calib, parse_recipe("rtn-w4a16", ["@output=w4a16"]), widths=(4,)).facts["layers"]
    adapter, (sigmas, states) = model.adapter, calib.batches(model.adapter)
    exact = [velocity(adapter, sigma, state) for sigma, state in zip(sigmas, states, strict=True)]
    predicted = {path: row["error"] for path, row in facts.items() if row["weight"] == "w4" and row["error"] > 0}
    measured = {}
    for path in predicted:
        with swapped(adapter.module, {path: rounded(adapter.layers()[path])}):
            wrong = [velocity(adapter, sigma, state) - y for sigma, state, y in zip(sigmas, states, exact, strict=True)]
        measured[path] = np.mean([np.square(w).mean() for w in wrong])
    assert measured["final_layer.linear"] == pytest.approx(predicted["final_layer.linear"], rel=1e-3)
    ours, theirs = (np.argsort(np.argsort([errors[path] for path in predicted])) for errors in (predicted, measured))
    assert len(ours) > 15
    assert np.corrcoef(ours, theirs)[0, 1] > 0.8


def velocity(adapter, sigma, state):
    with adapter.clock.at(sigma):
        for stage in adapter.stages:
            state = stage.run(state)
    return np.array(state["velocity"])


def rounded(linear):
    """A layer rounded to nearest in 4 bits."""
    weight = np.array(linear.weight)
    grid = fit_extremes(weight, WeightFormat(4))
    return QuantizedLinear(grid.quantize(weight), grid, linear.bias if "bias" in linear else None)


def test_inputs_average_what_was_asked_for(model, mixed):
    rows = {path: row for path, row in mixed.facts["layers"].items() if "activation" in row}
    specs = mixed.recipe.plan(roles(model))
    assert set(rows) == {path for path, spec in specs.items() if spec.activation is not None}
    assert 5.7 < mixed.facts["bits_per_activation"] <= 6
    assert len({row["activation"] for row in rows.values()}) > 3
    assert mixed.recipe.sensitivity  # budgets are of the velocity's error
    assert all(specs[path].activation.budget > 0 for path in rows)
    assert "activation" not in mixed.facts["layers"]["final_layer.linear"]


def test_the_sweep_takes_about_as_many_bits_as_was_said(model, calib, mixed):
    layers = mq.quantize(model, calib, mixed.recipe).layers
    said = {path: row["activation"] for path, row in mixed.facts["layers"].items() if "activation" in row}
    taken = {path: layers[path].table.bits.mean() for path in said}
    assert np.mean(list(taken.values())) == pytest.approx(np.mean(list(said.values())), abs=0.4)


def test_fewer_bits_cost_more(model, calib):
    recipe = parse_recipe("rtn-w4a8")
    errors = [
        allocate(model.adapter, calib, recipe, bits_per_activation=bits).facts["input_error"] for bits in (4, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 20 * errors[-1]


@pytest.mark.parametrize("name", ["gptq-w4a16", "qronos-w4a16"])
def test_prediction_is_for_the_method_that_will_round(model, calib, name):
    """Both see what GPTQ sees in the full-precision model, where the streams do not differ."""
    own, nearest = (
        allocate(model.adapter, calib, parse_recipe(recipe)).facts["error"] for recipe in (name, "rtn-w4a16")
    )
    assert own < 0.5 * nearest


def test_an_input_keeps_the_bits_that_its_specification_allows(model, calib):
    recipe = parse_recipe("rtn-w4a8", ["*.attn.q_proj=w4a4"])
    facts = allocate(model.adapter, calib, recipe, bits_per_activation=7).facts["layers"]
    assert {row["activation"] for path, row in facts.items() if path.endswith("attn.q_proj")} == {4.0}


def test_equal_calls_give_equal_plans(model, calib, mixed):
    fingerprint = model.adapter.fingerprint
    again = allocate(model.adapter, calib, parse_recipe("rtn-w4a8"), bits_per_weight=6, bits_per_activation=6)
    assert again.recipe.to_dict() == mixed.recipe.to_dict()
    assert again.facts == mixed.facts
    assert model.adapter.fingerprint == fingerprint


@pytest.mark.parametrize("finished", range(5))
def test_a_killed_survey_goes_on_in_the_stage_it_was_in(model, calib, mixed, tmp_path, monkeypatch, finished):
    """There are four stages; sensitivities, the first file, are measured once."""
    kept, surveyed, measured = [], [], []
    save, collect, probe = kept_arrays.Measurements.save, survey.weight_errors, sensitivity.measure

    def stop(self, name, tables):
        if len(kept) == finished:
            raise KeyboardInterrupt
        kept.append(name)
        save(self, name, tables)

    def again():
        return allocate(
            model.adapter, calib, parse_recipe("rtn-w4a8"), bits_per_weight=6, bits_per_activation=6, work=tmp_path
        )

    monkeypatch.setattr(kept_arrays.Measurements, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        again()
    monkeypatch.setattr(kept_arrays.Measurements, "save", save)
    monkeypatch.setattr(survey, "weight_errors", lambda path, *rest: surveyed.append(path) or collect(path, *rest))
    monkeypatch.setattr(sensitivity, "measure", lambda *rest, **more: measured.append(1) or probe(*rest, **more))
    assert kept == ["sensitivity", *(stage.name for stage in model.adapter.stages)][:finished]
    resumed = again()
    assert resumed.facts == mixed.facts
    assert resumed.recipe.to_dict() == mixed.recipe.to_dict()
    assert len(measured) == (not kept)
    left = model.adapter.stages[max(finished - 1, 0) :]
    assert surveyed == [path for stage in left for path in mixed.facts["layers"] if stage.owns(path)]


def test_a_survey_of_other_formats_is_not_taken(model, calib, tmp_path):
    def allocated(name, work):
        return allocate(model.adapter, calib, parse_recipe(name), bits_per_weight=6, work=work).facts

    allocated("rtn-w4a8", tmp_path)
    assert allocated("rtn-w4a16-g32", tmp_path) == allocated("rtn-w4a16-g32", None)


def test_other_limits_need_no_second_survey(model, calib, mixed, tmp_path, monkeypatch):
    allocate(model.adapter, calib, parse_recipe("rtn-w4a8"), bits_per_weight=5, bits_per_activation=7, work=tmp_path)
    monkeypatch.setattr(survey, "weight_errors", None)
    other = allocate(
        model.adapter, calib, parse_recipe("rtn-w4a8"), bits_per_weight=6, bits_per_activation=6, work=tmp_path
    )
    assert other.facts == mixed.facts


def test_inputs_are_surveyed_by_the_batches_of_the_recipe(model, calib, tmp_path):
    """Also where a survey of other batches is kept. All four pictures in one batch: the plain extremes."""
    budgets = {}
    for name in ("rtn", "rtn+average4", "rtn+average1"):
        found = allocate(model.adapter, calib, parse_recipe(f"{name}-w4a8"), bits_per_activation=6, work=tmp_path)
        budgets[name] = {spec.activation.budget for spec in found.plan.values() if spec.activation is not None}
    assert budgets["rtn"] == budgets["rtn+average4"] != budgets["rtn+average1"]


def test_allocation_and_sweep_share_sensitivities(model, calib, tmp_path, monkeypatch):
    probe, count = sensitivity.measure, []
    monkeypatch.setattr(sensitivity, "measure", lambda *rest, **more: count.append(1) or probe(*rest, **more))
    whole = mq.quantize(model, calib, "rtn+mixed+sensitivity-w4a8")
    kept = mq.quantize(model, calib, "rtn+mixed+sensitivity-w4a8", work=tmp_path)
    assert len(count) == 3
    assert kept.facts == whole.facts


def test_nothing_asked_is_nothing_changed(model, calib):
    recipe = parse_recipe("rtn-w4a8")
    same = allocate(model.adapter, calib, recipe).recipe
    assert same.plan(roles(model)) == recipe.plan(roles(model))


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("rtn-w4a8", {"bits_per_weight": 2.5},
        r"2\.5 bits .* cannot be met; its 32 layers take 3\.2"),
        ("rtn-w8a8", {"bits_per_weight": 6}, r"6 bits per weight cannot be met"),
        ("rtn-w4a8", {"bits_per_weight": float("nan")}, r"nan bits per weight cannot be met"),
        ("rtn-w4a8", {"bits_per_activation": 3.5}, r"3\.5 bits per activation cannot be met; inputs take 4 to 8"),
        ("rtn-w4a16", {"bits_per_activation": 6}, "quantizes no inputs"),
    ],
)  # fmt: skip
def test_limits_that_cannot_be_met_are_refused_at_once(model, calib, monkeypatch, name, limits, message):
    monkeypatch.setattr(allocation, "survey", None)
    with pytest.raises(RecipeError, match=message):
        allocate(model.adapter, calib, parse_recipe(name), **limits)
