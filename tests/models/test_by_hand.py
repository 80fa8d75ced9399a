"""A host that somebody writes by hand keeps the contract, with whichever norm, and recipes do to it what it says."""

import mlxquant as mq

# isort: split
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibration.passes import Passes
from mlxquant.curvature.sensitivity import measure
from mlxquant.errors import AdapterError
from mlxquant.layers.tree import parameters
from mlxquant.models.catalog import register_model
from mlxquant.models.stages import tensors
from mlxquant.sweep import rounding, sweep
from mlxquant.sweep.streams import ExactStream, stage_error

from support.adapter_contract import AdapterContract
from support.by_hand import WIDE, ByHand, D
from support.killed_sweep import killed_after

ALL = mq.parse_recipe("gptq+smoothquant+rotation-w4a4", ["blocks.1.*=keep"])


class TestByHand(AdapterContract):
    @classmethod
    def make_adapter(cls):
        return ByHand.pretrained()

    def whole(self, adapter, latent, conditioning, t):
        return adapter.module(latent, conditioning["pooled"], t)


def spiky(norm="layer"):
    """With some channels larger than others behind the norm and in the values, so that transforms help."""
    adapter, channels = ByHand.pretrained(norm), np.arange(D)
    for block in adapter.module.blocks:
        block.norm.weight = block.norm.weight * mx.array(np.where(channels % 11 == 3, 12, 1).astype(np.float32))
        block.v.weight = block.v.weight * mx.array(np.where(channels % 7 == 2, 10, 1).astype(np.float32))[:, None]
    return mq.Model(adapter)


@pytest.fixture(scope="module")
def model():
    return spiky()


@pytest.fixture(scope="module")
def calib(model):
    return mq.calibrate(model, prompts=2, steps=4)


def stages(done):
    return {stage["stage"]: stage for stage in done.facts["stages"]}


def gains(model):
    return {name: np.array(value) for name, value in parameters(model.adapter.module).items() if ".norm." in name}


def errors(done, model, calib):
    """What each stage of a quantized model writes wrong, on the way through it."""
    sigmas, states = calib.batches(model.adapter)
    exact = own = list(states)  # which are made anew whenever they are asked for
    found = {}
    for ours, theirs in zip(model.adapter.stages, done.adapter.stages, strict=True):
        before, exact = exact, Passes(model.adapter, sigmas).through(ours, exact)
        own = Passes(done.adapter, sigmas).through(theirs, own)
        new = [{key: state[key] for key in tensors(state, came)} for state, came in zip(exact, before, strict=True)]
        found[ours.name] = stage_error(own, new)
    return found


def test_norms_and_columns_take_in_what_recipes_find(model, calib):
    done = mq.quantize(model, calib, ALL)
    for name, stage in stages(done).items():
        if name in ("blocks.0", "blocks.2"):
            smoothed, rotated = (set(stage["transforms"][method]["tensors"]) for method in ("smoothquant", "rotation"))
            needed, mlp = {f"{name}.q", f"{name}.out[0:{D}]"}, f"{name}.out[{D}:{D + WIDE}]"
            assert needed <= smoothed <= needed | {mlp}
            assert rotated <= needed | {mlp, f"{name}.out"}
            assert stage["kept"].startswith("calibrated+smoothquant")
            assert stage["error"] < 0.7 * stage["errors"]["calibrated"]
    after = gains(done)
    changed = {name for name, before in gains(model).items() if not np.array_equal(before, after[name])}
    assert changed == {f"blocks.{index}.norm.{kind}" for index in (0, 2) for kind in ("weight", "bias")}
    told = {name: stage["error"] for name, stage in stages(done).items() if "error" in stage}
    found = errors(done, model, calib)
    assert {name: found[name] for name in told} == pytest.approx(told, rel=1e-4)


def test_codes_are_learned_behind_the_norms_that_they_get(model, calib, monkeypatch):
    kept = ["blocks.[01].*=keep", "join=keep", "head=keep", "embed=keep", "text=keep"]
    recipe = mq.parse_recipe("gptq+smoothquant+learned-w3a16", kept)
    learn, seen = sweep.reconstruct_stage, []

    def watched(method, work, *rest):
        seen.append(np.array(work._adapter.module.blocks[2].norm.weight))
        return learn(method, work, *rest)

    monkeypatch.setattr(sweep, "reconstruct_stage", watched)
    done = mq.quantize(model, calib, replace(recipe, learning=replace(recipe.learning, iterations=1)))
    assert stages(done)["blocks.2"]["kept"] == "calibrated+smoothquant"
    np.testing.assert_array_equal(seen[0], gains(done)["blocks.2.norm.weight"])
    assert not np.array_equal(seen[0], gains(model)["blocks.2.norm.weight"])


def test_a_part_is_chosen_beside_the_others_and_a_rotation_of_all_on_top_of_them(model, calib, monkeypatch):
    given, choose = [], rounding.propose

    def watched(method, consumers, *rest):
        given.append((method, consumers[0].part, consumers[0].others.parts))
        return choose(method, consumers, *rest)

    monkeypatch.setattr(rounding, "propose", watched)
    kept = ["blocks.[12].*=keep", "join=keep", "head=keep", "embed=keep", "text=keep"]
    mq.quantize(model, calib, mq.parse_recipe("gptq+smoothquant+rotation-w4a4", kept))
    asked = {(method, str(part)): [other for other, _ in others] for method, part, others in given}
    attention, mlp = slice(0, D), slice(D, D + WIDE)
    assert asked["smoothquant", str(attention)] == []
    assert asked["smoothquant", str(mlp)] == [attention]
    assert asked["rotation", str(slice(None))][:1] == [attention]


def test_a_killed_run_finds_the_norms_again_and_a_saved_model_has_them(model, calib, tmp_path):
    whole = mq.quantize(model, calib, ALL)
    with killed_after(2):
        mq.quantize(model, calib, ALL, work=tmp_path / "work")
    done = mq.quantize(model, calib, ALL, work=tmp_path / "work")
    assert not np.array_equal(gains(done)["blocks.0.norm.weight"], gains(model)["blocks.0.norm.weight"])
    for name, value in gains(whole).items():
        np.testing.assert_array_equal(gains(done)[name], value)
    register_model(ByHand)
    done.save(tmp_path / "saved")
    read = mq.load(tmp_path / "saved")
    for name, value in gains(read).items():
        np.testing.assert_array_equal(value, gains(done)[name])
    prompts = model.diffusion.prompts("evaluation", 1)
    np.testing.assert_array_equal(read.images(prompts), done.images(prompts))


def test_only_what_a_gelu_wrote_is_shifted(calib, model):
    layers = mq.quantize(model, calib, "rtn+shift-w8a8").layers
    tables = [layers[f"blocks.{index}.out"].table for index in range(3)]
    shifted = [table.shift for table in tables if table.shift.shape[1] > 1]
    assert shifted
    for shift in shifted:
        assert np.ptp(shift[:, :D], axis=1).max() == 0
        assert np.ptp(shift[:, D:], axis=1).min() > 0


def test_a_role_of_its_own_is_as_careful_as_it_says(model):
    plan = mq.parse_recipe("gptq+smoothquant-w4a8").plan(model.adapter.roles())
    assert plan["join"].weight.bits == 8
    assert plan["join"].activation is None
    assert plan["blocks.0.up"].weight.bits == 4
    assert mq.parse_recipe("gptq-w4a8", ["@join=w4a8"]).plan(model.adapter.roles())["join"].weight.bits == 4


class Renamed(ByHand):
    """The same model, whose middle block hands the skip on, and not the one that writes it."""

    def _down(self, state):
        return {key: value for key, value in super()._down(state).items() if key != "skip"}

    def _middle(self, state):
        return super()._middle(state | {"skip": state["x"]})


@pytest.fixture(scope="module")
def two(calib, model):
    """The model and the same one ``Renamed``, with sigmas and states for both."""
    other = Renamed("layer")
    other.module.update(model.adapter.module.parameters())
    return model.adapter, other, *calib.batches(model.adapter)


def test_a_skip_counts_once(two):
    ours, other, sigmas, states = two
    for adapter in (ours, other):
        stream = ExactStream(Passes(adapter, sigmas), states)
        wrote = [set(stream.targets(stage)[0]) for stage in adapter.stages]
        assert wrote == [{"x", "c"}, {"x"}, {"x"}, {"x"}, {"velocity"}]


def test_what_an_error_in_a_skip_costs_is_what_all_that_read_it_make_of_it(two):
    ours, other, sigmas, states = two
    found = [measure(Passes(a, sigmas), a.stages, states, ["blocks.0.out"]) for a in (ours, other)]
    assert set(found[0].stages["blocks.0"]) == {"x"}
    for name, table in found[0].tables.items():
        np.testing.assert_allclose(table, found[1].tables[name], rtol=1e-4)


def test_an_adapter_says_what_counts_in_a_stages_error(model, calib, monkeypatch):
    def first(counts):
        monkeypatch.setattr(ByHand, "counts", lambda self, stage, key: counts.get(f"{stage.name}/{key}", 1.0))
        return stages(mq.quantize(model, calib, "rtn-w2a16"))["embed"]["error"]

    of_x, of_c, both = first({"embed/c": 0.0}), first({"embed/x": 0.0}), first({})
    assert both == pytest.approx((of_x + of_c) / 2)
    assert first({"embed/x": 3.0}) == pytest.approx((3 * of_x + of_c) / 4)
    for counts in ({"embed/x": 0.0, "embed/c": 0.0}, {"embed/x": -1.0}, {"embed/c": float("nan")}):
        with pytest.raises(AdapterError, match=r"by-hand: what stage embed writes counts \{'x': .*of at least 0, one"):
            first(counts)


def test_a_role_that_is_no_text_is_an_error_that_names_the_layer(model, monkeypatch):
    monkeypatch.setattr(ByHand, "role", lambda self, path: None if path == "join" else "mlp")
    with pytest.raises(AdapterError, match=r"^by-hand, layer join: a role is one word .*, found None$"):
        mq.quantize(model, mq.calibrate(model, prompts=1, steps=1), "rtn-w4a16")
