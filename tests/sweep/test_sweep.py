"""The sweep: gates, order, resumption, and what it refuses."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.calibration.passes import Passes
from mlxquant.curvature.sensitivity import measured
from mlxquant.errors import ArtifactError, CalibrationError, NumericsError, RecipeError
from mlxquant.files import checked
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.tree import get_module, tapped
from mlxquant.methods import registry
from mlxquant.methods.weights.adaround import Settings
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sweep.collecting import Collector
from mlxquant.sweep.folding import divide
from mlxquant.sweep.inputs import LayerInput, Options, decide_input
from mlxquant.sweep.streams import ExactStream, stage_error
from mlxquant.sweep.sweep import Sweep

from support.killed_sweep import killed_after
from support.tiny_pictures import tiny_adapter

BLOCK = "multimodal_transformer_blocks.0"


def calibrate(model, prompts=2, steps=2):
    return mq.calibrate(model, prompts=prompts, steps=steps)


def arrays(qmodel):
    return {name: np.array(value) for name, value in qmodel._arrays().items()}


def assert_same(a, b):
    a, b = arrays(a), arrays(b)
    assert set(a) == set(b)
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


def test_the_model_itself_is_left_alone(tiny):
    before = tiny.adapter.fingerprint
    quantized = mq.quantize(tiny, calibrate(tiny), "rtn-w4a8")
    assert tiny.adapter.fingerprint == before
    assert not [m for _, m in tiny.adapter.module.named_modules() if isinstance(m, QuantizedLinear)]
    assert set(quantized.layers) == set(tiny.adapter.layers())
    assert {stage["kept"] for stage in quantized.facts["stages"]} == {"rtn"}


def test_formats_follow_the_recipe(tiny):
    quantized = mq.quantize(
        tiny, calibrate(tiny), parse_recipe("rtn-w3a6-g32", ["*.mlp.fc2=w5a16", "context_embedder=keep"])
    )
    layers = quantized.layers
    block = "multimodal_transformer_blocks.0.image_transformer_block"
    assert "context_embedder" not in layers
    assert str(layers[f"{block}.attn.q_proj"].format) == "w3-g32"
    assert set(layers[f"{block}.attn.q_proj"].table.bits) == {6}
    assert str(layers[f"{block}.mlp.fc2"].format) == "w5"
    assert layers[f"{block}.mlp.fc2"].table is None
    for path in (f"{block}.adaLN_modulation.layers.1", "t_embedder.mlp.layers.0", "final_layer.linear"):
        assert layers[path].format.bits == 8
        assert layers[path].table is None


def test_the_batch_of_averaged_ranges_decides_and_is_recorded(tiny, tmp_path):
    """Of three pictures; what was asked for is in the recipe, what there was in the facts."""
    calib, fc2 = calibrate(tiny, prompts=3), f"{BLOCK}.image_transformer_block.mlp.fc2"
    done = {batch: mq.quantize(tiny, calib, f"rtn+average{batch}-w8a8") for batch in (1, 2, 3, 32)}
    steps = {batch: qmodel.layers[fc2].table.step for batch, qmodel in done.items()}
    assert (steps[1] < steps[2]).all()
    assert (steps[2] < steps[3]).all()
    assert_same(done[3], done[32])
    assert_same(done[32], mq.quantize(tiny, calib, "rtn-w8a8"))
    for batch, qmodel in done.items():
        qmodel.save(tmp_path / str(batch))
        facts = mq.load(tmp_path / str(batch)).facts
        assert facts["recipe"]["range_batch"] == batch
        assert facts["range_batch"] == min(batch, 3)
    assert "range_batch" not in mq.quantize(tiny, calib, "rtn-w8a8").facts


def test_every_timestep_has_its_own_scales_and_static_has_one(tiny):
    calib = calibrate(tiny, steps=3)
    path = "multimodal_transformer_blocks.1.image_transformer_block.mlp.fc1"
    table = mq.quantize(tiny, calib, "rtn-w8a8").layers[path].table
    np.testing.assert_allclose(table.sigma, calib.sigmas[::-1], rtol=1e-6)
    assert len(set(table.step.tolist())) == 3
    assert len(mq.quantize(tiny, calib, "rtn-w8a8-static").layers[path].table.step) == 1


FC2 = "multimodal_transformer_blocks.1.image_transformer_block.mlp.fc2"
UNUSED = "multimodal_transformer_blocks.1.text_transformer_block.attn.q_proj"  # the last block drops what text asks


def tiered(name="gptq-w4a8", budget=1e-5, sensitivity=True, **changes):
    """A recipe whose layers choose their bits; the budget is for the tiny model, whose velocities are not of unit
    variance.
    """
    recipe = replace(parse_recipe(name), sensitivity=sensitivity)
    activation = {"budget": budget, "shift": True, **changes}
    rules = tuple(
        (p, replace(s, activation=replace(s.activation, **activation)) if s.activation else s) for p, s in recipe.rules
    )
    return replace(recipe, rules=rules)


def tables(quantized):
    return {path: layer.table for path, layer in quantized.layers.items() if layer.table is not None}


@pytest.fixture
def skewed(tiny):
    """Half of the channels after one GELU are far from zero, so that shifting them pays."""
    fc1 = get_module(tiny.adapter.module, FC2.replace("fc2", "fc1"))
    fc1.bias = fc1.bias + mx.where(mx.arange(128) < 64, 8.0, 0.0)
    return tiny


def test_tiers_are_chosen_in_the_sweep_and_survive_the_disk(skewed, tmp_path):
    tiny = skewed
    calib = calibrate(tiny, steps=3)
    quantized = mq.quantize(tiny, calib, tiered())
    found = tables(quantized)
    assert set(found) == {path for path in tiny.adapter.layers() if tiny.adapter.role(path) in ("attention", "mlp")}
    assert {4, 6, 8} == {int(b) for table in found.values() for b in table.bits}
    assert any(len(set(table.bits.tolist())) > 1 for table in found.values())
    assert (found[UNUSED].bits == 4).all()
    wide = {path for path, table in found.items() if table.shift.shape == (3, 128)}
    assert FC2 in wide
    assert all(path.endswith("mlp.fc2") or table.shift.shape == (3, 1) for path, table in found.items())
    quantized.save(tmp_path / "q")
    loaded = mq.load(tmp_path / "q")
    assert_same(loaded, quantized)
    for path, table in tables(loaded).items():
        np.testing.assert_array_equal(table.bits, found[path].bits)
        np.testing.assert_array_equal(table.shift, found[path].shift)
    prompts = tiny.adapter.prompts("evaluation", 2)
    np.testing.assert_array_equal(loaded.images(prompts, steps=3), quantized.images(prompts, steps=3))
    np.testing.assert_array_equal(mq.load(tmp_path / "q").images(prompts, steps=4), quantized.images(prompts, steps=4))


def test_a_wider_budget_takes_fewer_bits_and_never_more_than_the_recipes(tiny):
    calib = calibrate(tiny, steps=3)
    bits = [
        np.concatenate(
            [t.bits for p, t in tables(mq.quantize(tiny, calib, tiered("rtn-w8a6", budget))).items() if p != UNUSED]
        )
        for budget in (1e-12, 1e-5, 1e6)
    ]
    assert [set(b.tolist()) for b in bits] == [{6}, {4, 6}, {4}]


def test_a_static_recipe_chooses_once(skewed):
    found = tables(mq.quantize(skewed, calibrate(skewed, steps=3), tiered("rtn-w8a8-static")))
    assert {table.bits.shape for table in found.values()} == {(1,)}
    assert found[FC2].shift.shape == (1, 128)
    assert found[FC2.replace("fc2", "fc1")].shift.shape == (1, 1)
    assert len({int(table.bits[0]) for table in found.values()}) > 1


def test_without_a_sensitivity_the_budget_is_relative(tiny):
    found = tables(mq.quantize(tiny, calibrate(tiny, steps=3), tiered("rtn-w8a8", 0.0012, sensitivity=False)))
    assert {int(b) for table in found.values() for b in table.bits} == {6, 8}
    loose = tables(mq.quantize(tiny, calibrate(tiny, steps=3), tiered("rtn-w8a8", 1.0, sensitivity=False)))
    assert {int(b) for table in loose.values() for b in table.bits} == {4}


def test_bits_are_those_that_the_measured_costs_allow(tiny):
    """The first block, whose inputs are the exact model's: what was decided, against the rule on what the model really
    reads.
    """
    calib, recipe = calibrate(tiny, steps=3), tiered("rtn-w8a8")
    table = tables(mq.quantize(tiny, calib, recipe))[FC2]
    sigmas, states = calib.batches(tiny.adapter)
    plan = recipe.plan(tiny.adapter.roles())
    costs = measured(Passes(tiny.adapter, sigmas), tiny.adapter.stages, states, plan).of_outputs(FC2, table.sigma)
    collector = Collector({FC2: tiny.adapter.layers()[FC2]})
    with tapped(tiny.adapter.module, [FC2], collector):
        for sigma, state in zip(sigmas, states, strict=True):
            collector.sigma = sigma
            with tiny.adapter.clock.at(sigma):
                for stage in tiny.adapter.stages:
                    state = stage.run(state)
                mx.eval(state)
    ranges, weight = collector[FC2].ranges, np.array(tiny.adapter.layers()[FC2].weight)
    expected = decide_input(
        LayerInput(ranges, weight, costs), (ranges.least + ranges.most) / 2, Options(budget=1e-5)
    ).table
    np.testing.assert_array_equal(table.bits, expected.bits)
    np.testing.assert_allclose(table.shift, expected.shift, rtol=0.05, atol=0.05)


def test_taqdit_learns_with_tiers(tiny):
    recipe = replace(tiered("taqdit-w4a8"), learning=Settings(iterations=20, batch=4))
    quantized = mq.quantize(tiny, calibrate(tiny), recipe)
    blocks = [stage for stage in quantized.facts["stages"] if "learning" in stage]
    assert len(blocks) == 2
    assert {int(b) for table in tables(quantized).values() for b in table.bits} >= {4, 8}
    assert all(np.isfinite(stage["error"]) for stage in blocks)


def test_stages_are_never_worse_than_rounding(tiny):
    quantized = mq.quantize(tiny, calibrate(tiny), "gptq-w2a16")
    gated = [stage for stage in quantized.facts["stages"] if "rtn" in stage["errors"]]
    assert len(gated) == len(tiny.adapter.stages)
    for stage in gated:
        assert stage["error"] == min(stage["errors"].values()) == stage["errors"][stage["kept"]]
    assert sum(s["error"] < 0.9 * s["errors"]["rtn"] for s in gated) >= 2


def test_a_method_that_hurts_is_dropped_and_it_says_so(tiny, monkeypatch):
    plain = mq.quantize(tiny, calibrate(tiny), "rtn-w4a16")
    broken = registry.Method("gptq", "round", lambda w, grid, moments: np.zeros(w.shape, np.uint8), None, "broken")
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda kind, name: broken if name == "gptq" else get(kind, name))
    quantized = mq.quantize(tiny, calibrate(tiny), "gptq-w4a16")
    assert {stage["kept"] for stage in quantized.facts["stages"]} == {"rtn"}
    assert_same(quantized, plain)


def test_running_twice_gives_the_same_model(tiny):
    calib = calibrate(tiny)
    assert_same(mq.quantize(tiny, calib, "gptq-w4a8"), mq.quantize(tiny, calib, "gptq-w4a8"))


@pytest.mark.parametrize("stage", range(4))
def test_interrupted_sweep_resumes_to_the_same_model(tiny, tmp_path, monkeypatch, stage):
    calib = calibrate(tiny)
    whole = mq.quantize(tiny, calib, "gptq-w4a8")
    with killed_after(stage):
        mq.quantize(tiny, calib, "gptq-w4a8", work=tmp_path)
    rebuilt = []
    original = Sweep.quantize
    monkeypatch.setattr(Sweep, "quantize", lambda self, s, *rest: rebuilt.append(s.name) or original(self, s, *rest))
    assert_same(mq.quantize(tiny, calib, "gptq-w4a8", work=tmp_path), whole)
    assert rebuilt == [s.name for s in tiny.adapter.stages][stage:]


def test_progress_of_another_job_is_not_used(tiny, tmp_path):
    calib = calibrate(tiny)
    mq.quantize(tiny, calib, "rtn-w2a16", work=tmp_path)
    assert_same(mq.quantize(tiny, calib, "rtn-w4a16", work=tmp_path), mq.quantize(tiny, calib, "rtn-w4a16"))


def test_damaged_progress_is_refused(tiny, tmp_path):
    calib = calibrate(tiny)
    mq.quantize(tiny, calib, "rtn-w4a16", work=tmp_path)
    path = tmp_path / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=r"head\.safetensors"):
        mq.quantize(tiny, calib, "rtn-w4a16", work=tmp_path)


def test_nan_weights_are_named(tiny):
    calib = calibrate(tiny)
    linear = tiny.adapter.layers()["final_layer.linear"]
    linear.weight[3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"final_layer\.linear\.weight holds 1 NaN"):
        mq.quantize(tiny, calib, "rtn-w4a16")
    with pytest.raises(NumericsError, match=r"final_layer\.linear\.weight holds 1 NaN"):
        mq.calibrate(tiny, prompts=1, steps=1)


def test_foreign_or_empty_calibration_is_refused(tiny):
    calib = calibrate(tiny)
    tiny.adapter.module.final_layer.linear.bias[0] = 7.0
    with pytest.raises(CalibrationError, match="of other weights"):
        mq.quantize(tiny, calib, "rtn-w4a16")
    with pytest.raises(CalibrationError, match="at least one prompt"):
        mq.calibrate(tiny, prompts=[])


def test_unconditional_calibration_sees_what_the_sampler_sees(tiny):
    calib = mq.calibrate(tiny, prompts=1, steps=1, cfg=0)
    _, states = calib.batches(tiny.adapter)
    empty = tiny.adapter.encode([""])
    assert mx.array_equal(states[0]["tokens"], empty["tokens"])


def test_errors_are_measured_on_what_a_stage_writes(tiny):
    calib = calibrate(tiny)
    sigmas, states = calib.batches(tiny.adapter)
    embed, block = tiny.adapter.stages[:2]
    inputs = Passes(tiny.adapter, sigmas).through(embed, states)
    targets = ExactStream(Passes(tiny.adapter, sigmas), inputs).targets(block)
    assert set(targets[0]) == {"image", "text"}
    assert stage_error(targets, targets) == 0
    halved = [{**s, "image": s["image"] * 0.5} for s in targets]
    assert stage_error(halved, targets) == pytest.approx(
        0.25 / 2
    )  # image and text count the same, the conditioning not


def test_weights_of_any_magnitude_have_the_same_codes(tiny):
    """Scales past float16's range are float32: a layer is no worse for being large."""
    path = "final_layer.linear"
    usual = mq.quantize(tiny, calibrate(tiny), "rtn-w4a16").layers[path]
    tiny.adapter.layers()[path].weight *= 2.0**30
    large = mq.quantize(tiny, calibrate(tiny), "rtn-w4a16").layers[path]
    np.testing.assert_array_equal(large.codes(), usual.codes())
    assert (usual.scales.dtype, large.scales.dtype) == (mx.float16, mx.float32)


def test_a_stage_that_writes_no_numbers_is_named(tiny, monkeypatch):
    calib = calibrate(tiny)
    monkeypatch.setattr(
        QuantizedLinear, "_multiply_quantized", lambda self, x: mx.full((*x.shape[:-1], self.shape[0]), mx.nan)
    )
    with pytest.raises(NumericsError, match=r"stage embed, quantized \(rtn\), writes NaN or infinite values; use more"):
        mq.quantize(tiny, calib, "rtn-w4a16")


def test_groups_that_do_not_fit_are_refused_at_once(tiny):
    with pytest.raises(RecipeError, match="groups of 128 do not divide an input width of 32"):
        mq.quantize(tiny, calibrate(tiny), "rtn-w4a16-g128")


def test_quantizing_twice_is_refused(tiny):
    calib = calibrate(tiny)
    with pytest.raises(RecipeError, match="quantized already"):
        mq.quantize(mq.quantize(tiny, calib, "rtn-w4a16"), calib, "rtn-w4a16")


def test_calibration_is_saved_and_loaded(tiny, tmp_path):
    calib = calibrate(tiny)
    calib.save(tmp_path / "c.safetensors")
    again = type(calib).load(tmp_path / "c.safetensors")
    assert again.facts == calib.facts
    assert mx.array_equal(again.latents, calib.latents)
    np.testing.assert_array_equal(again.sigmas, calib.sigmas)


def test_equal_facts_give_equal_digests():
    assert checked.digest({"a": 1, "b": [2]}) == checked.digest({"b": [2], "a": 1})


def spiky():
    """The tiny model with one channel of two inputs forty times louder: the same function, an input that one step
    serves badly.
    """
    model = mq.Model(tiny_adapter())
    edges = {edge.consumers[0]: edge for edge in model.adapter.edges()}
    for first in (f"{BLOCK}.image_transformer_block.attn.q_proj", f"{BLOCK}.image_transformer_block.mlp.fc1"):
        quiet = np.ones(32, np.float32)
        quiet[5] = 1 / 40
        divide(model.adapter.module, edges[first], quiet)
    return model


def test_spiky_inputs_are_smoothed_inside_the_sweep(tmp_path):
    model = spiky()
    calib = calibrate(model, steps=3)
    assert model.adapter.edges()[0].consumers[0] == f"{BLOCK}.image_transformer_block.attn.q_proj"
    recipe = replace(tiered("gptq+smoothquant-w8a8"), gate=False)
    quantized = mq.quantize(model, calib, recipe)
    facts = quantized.facts["stages"][1]["transforms"]["smoothquant"]
    assert facts["kept"]
    assert set(facts["tensors"]) >= {f"{BLOCK}.image_transformer_block.{layer}" for layer in ("attn.q_proj", "mlp.fc1")}
    assert all(tensor["error_after"] < tensor["error_before"] for tensor in facts["tensors"].values())
    rough = mq.quantize(model, calib, replace(tiered("gptq-w8a8", budget=None), gate=False))
    prompts = model.adapter.prompts("evaluation", 2)
    exact, both = (q.images(prompts, 3) for q in (model, quantized))
    assert np.abs(exact - both).mean() < 0.02
    table = quantized.layers[f"{BLOCK}.image_transformer_block.mlp.fc1"].table
    assert (
        table.step * 2.0**table.bits
        < 0.5 * rough.layers[f"{BLOCK}.image_transformer_block.mlp.fc1"].table.step * 2.0**8
    ).all()
    quantized.save(tmp_path / "q")
    np.testing.assert_array_equal(mq.load(tmp_path / "q").images(prompts, 3), both)


def test_what_is_not_stored_is_not_divided():
    """A fold into a layer that stays as it is would be lost when a killed sweep resumes."""
    model = spiky()
    recipe = parse_recipe("taqdit-w8a8", ["@modulation=keep"])
    quantized = mq.quantize(model, calibrate(model, steps=3), replace(recipe, learning=Settings(iterations=2, batch=2)))
    facts = quantized.facts["stages"][1]["transforms"]["smoothquant"]
    assert facts["kept"]
    assert facts["tensors"]
    for path in facts["tensors"]:
        folded = path.endswith(
            "o_proj"
        )  # into values, which are quantized; adaLN is not, so the layer divides while it runs
        assert ("act_divisor" in quantized.layers[path]) != folded
