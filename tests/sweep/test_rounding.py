"""What a stage is tried with: transforms, the order of rounding, branches, damping, rounds and attention
probabilities.
"""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.api.plan import plan
from mlxquant.errors import NumericsError, RecipeError
from mlxquant.files.checked import read_tensors
from mlxquant.layers.attention import find_quantized_attentions
from mlxquant.layers.tree import parameters
from mlxquant.methods import registry
from mlxquant.methods.weights.lowrank import DAMPINGS
from mlxquant.numerics.low_rank import LowRank
from mlxquant.numerics.transform import Transform
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sweep import layer as layer_rounding
from mlxquant.sweep import rounding
from mlxquant.sweep.rounding import Rounding
from mlxquant.sweep.sweep import Sweep
from mlxquant.sweep.transform_choice import Proposal, propose

from support.synthetic_chain import Chain
from support.tiny_pictures import tiny_adapter

BLOCK = "multimodal_transformer_blocks.0"


@pytest.fixture(scope="module")
def spiky():
    """A tiny model that writes a few channels much larger than the others before every GELU and in every value."""
    adapter = tiny_adapter()
    for path, layer in adapter.layers().items():
        if path.endswith(("v_proj", "mlp.fc1")):
            layer.weight = layer.weight * mx.where(mx.arange(layer.weight.shape[0]) % 16 == 3, 12.0, 1.0)[:, None]
    return mq.Model(adapter)


@pytest.fixture(scope="module")
def calib(spiky):
    return mq.calibrate(spiky, prompts=4, steps=3)


def arrays(model):
    return {name: np.array(value) for name, value in parameters(model.adapter.module).items()}


def velocity(model):
    latent = mx.random.normal((2, *model.adapter.latent_shape), key=mx.random.key(0))
    text = model.adapter.encode(["a large red circle at left on white background", ""])
    return np.array(model.adapter.velocity(latent, text, 1.0))


@pytest.mark.parametrize("name", [method.name for method in registry.members("transform")])
def test_a_transform_is_kept_only_where_the_block_gains_and_leaves_the_model(spiky, calib, name):
    before = arrays(spiky)
    done = mq.quantize(spiky, calib, f"gptq+{name}-w4a4")
    for key, value in arrays(spiky).items():
        np.testing.assert_array_equal(value, before[key])
    for stage in done.facts["stages"]:
        for method, facts in stage.get("transforms", {}).items():
            assert method == name
            assert all(tensor["error_after"] < tensor["error_before"] for tensor in facts["tensors"].values())
            if facts["tensors"]:
                assert facts["kept"] == (
                    facts["error"] < stage["errors"].get("calibrated", np.inf) or "calibrated" not in stage["errors"]
                )
                assert (stage["kept"] == f"calibrated+{name}") <= facts["kept"]


@pytest.mark.parametrize("recipe", ["rtn", "smoothquant", "quarot", "gptq+smoothquant+rotation+whitened4"])
def test_at_high_precision_nothing_but_rounding_is_left(spiky, calib, recipe):
    """Transforms and branches are exact: whatever was kept, 8-bit weights alone hardly change the velocity."""
    done = mq.quantize(spiky, calib, replace(parse_recipe(f"{recipe}-w8a16"), gate=False))
    exact = velocity(spiky)
    assert np.linalg.norm(velocity(done) - exact) < 0.03 * np.linalg.norm(exact)


def test_rotated_and_divided_layers_survive_the_disk(spiky, calib, tmp_path):
    done = mq.quantize(spiky, calib, "gptq+smoothquant+rotation+whitened4-w4a4")
    layers = done.layers.values()
    assert any(layer.rotation > 1 for layer in layers)
    assert any(layer.branch is not None for layer in layers)
    done.save(tmp_path / "q")
    loaded = mq.load(tmp_path / "q")
    np.testing.assert_array_equal(velocity(loaded), velocity(done))
    assert loaded.size == done.size


def test_a_killed_sweep_with_transforms_ends_with_the_same_bytes(spiky, calib, tmp_path):
    recipe = "gptq+smoothquant+rotation+softmax8-w4a4"
    whole = mq.quantize(spiky, calib, recipe)
    mq.quantize(spiky, calib, recipe, work=tmp_path)
    next(tmp_path.glob(f"{BLOCK.rpartition('.')[0]}*1.safetensors")).unlink()
    again = mq.quantize(spiky, calib, recipe, work=tmp_path)
    for name, value in arrays(again).items():
        np.testing.assert_array_equal(value, arrays(whole)[name])


def test_costs_follow_what_is_folded_into_a_layers_rows(spiky, calib, monkeypatch):
    """What its outputs are worth in all is the same before and after: a row that was divided writes less, and its
    errors cost more.
    """
    worth, rows, read = {}, {}, Rounding._input

    def watched(self, path, spec, ranges, weight=None, folded=None):
        found = read(self, path, spec, ranges, weight, folded)
        if weight is not None:
            outputs = np.square(found.ranges.rows @ found.weight.T).mean(1)
            worth.setdefault(path, []).append((outputs * found.costs).sum())
            rows.setdefault(path, []).append(np.linalg.norm(found.weight, axis=1))
        return found

    monkeypatch.setattr(Rounding, "_input", watched)
    monkeypatch.setattr(
        rounding, "propose", lambda *given: replace(propose(*given), before=np.inf)
    )  # so that everything is tried
    mq.quantize(spiky, calib, "gptq+smoothquant+tiers-w4a8")
    values = [path for path in worth if path.endswith("v_proj")]
    assert any(not np.allclose(rows[path][-1], rows[path][0], rtol=0.01) for path in values)
    for path in values:
        np.testing.assert_allclose(worth[path], worth[path][0], rtol=1e-3)


def test_sequential_recipes_show_each_layer_what_rounded_ones_write(spiky, calib, monkeypatch):
    groups, statistics = [], Rounding._statistics

    def watched(self, paths, online, done):
        groups.append((list(paths), set(done)))
        return statistics(self, paths, online, done)

    monkeypatch.setattr(Rounding, "_statistics", watched)
    mq.quantize(spiky, calib, "gptq+sequential-w4a16")
    block = [(paths, done) for paths, done in groups if any(path.startswith(BLOCK) for path in paths)]
    names = [{path.rpartition(".")[2] for path in paths} for paths, _ in block]
    assert names[-4:] == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"fc1"}, {"fc2"}]
    assert all(any("text" in path for path in paths) and any("image" in path for path in paths) for paths, _ in block)
    for index, (_, done) in enumerate(block):
        assert done == {path for paths, _ in block[:index] for path in paths}


def test_sequential_recipes_round_for_what_rounded_layers_write(spiky, calib):
    """Not only say so: other codes come out of it than when all layers are seen in full precision."""
    recipes = (replace(parse_recipe(f"gptq{way}-w3a16"), gate=False) for way in ("", "+sequential"))
    whole, sequential = (mq.quantize(spiky, calib, recipe).layers for recipe in recipes)
    second = [path for path in whole if path.startswith(BLOCK) and path.endswith(("o_proj", "fc1", "fc2"))]
    assert len(second) > 4
    assert all((whole[path].codes() != sequential[path].codes()).any() for path in second)


@pytest.mark.parametrize("recipe", ["gptq+sequential-w4a16", "gptq+rotation-w4a16"])
def test_a_layer_that_never_runs_is_named_with_the_remedy(recipe):
    class Idle(Chain):
        def __init__(self, *shape):
            super().__init__(*shape)
            self.module.idle = nn.Linear(64, 64)
            embed, *others = self._stages
            self._stages = (replace(embed, prefixes=(*embed.prefixes, "idle")), *others)

    model = mq.Model(Idle())
    with pytest.raises(NumericsError, match=r"layer idle was never reached.*'idle=keep'"):
        mq.quantize(model, mq.calibrate(model, prompts=2, steps=2), recipe)


def test_a_transform_that_overflows_is_not_kept_and_it_says_so(spiky, calib, monkeypatch):
    def huge(method, readers, place, current, allowed):
        return Proposal(Transform(np.full(readers[0].seen.weight.shape[1], 1e-25, np.float32)), 1.0, 0.5)

    monkeypatch.setattr(rounding, "propose", huge)
    stages = mq.quantize(spiky, calib, "gptq+smoothquant-w4a16").facts["stages"]
    found = [
        stage["transforms"]["smoothquant"]
        for stage in stages
        if stage.get("transforms", {}).get("smoothquant", {}).get("tensors")
    ]
    assert found
    assert all(not facts["kept"] and "infinite" in facts["failed"] for facts in found)
    assert {stage["kept"] for stage in stages} <= {"calibrated", "rtn"}


@pytest.mark.parametrize(("hurts", "helps"), [("smoothquant", "rotation"), ("rotation", "smoothquant")])
def test_what_hurts_goes_and_what_helps_stays_whichever_is_tried_first(monkeypatch, hurts, helps):
    """One channel is far larger than the others, and its weights smaller: to divide it helps, to make another one as
    large does not.
    """
    chain, channels = Chain(blocks=1, width=16, side=8), np.arange(16)
    size = mx.where(mx.arange(16) == 3, 40.0, 1.0)
    chain.module.embed.weight = chain.module.embed.weight * size[:, None]
    chain.module.blocks[0].weight = chain.module.blocks[0].weight / size
    divisors = {helps: np.where(channels == 3, 40, 1), hurts: np.where(channels == 7, 1e-3, 1)}

    def proposed(method, readers, place, current, allowed):
        return Proposal(current.then(Transform(divisors[method].astype(np.float32))), 1.0, 0.5)

    monkeypatch.setattr(rounding, "propose", proposed)
    model = mq.Model(chain)
    done = mq.quantize(model, mq.calibrate(model, prompts=2, steps=2), "gptq+smoothquant+rotation-w4a4")
    stage = next(stage for stage in done.facts["stages"] if stage["stage"] == "blocks.0")
    tried, errors = stage["transforms"], stage["errors"]
    assert stage["kept"] == f"calibrated+{helps}"
    assert stage["error"] == tried[helps]["error"] < min(errors["calibrated"], tried[hurts]["error"])
    assert tried[helps]["kept"]
    assert not tried[hurts]["kept"]
    np.testing.assert_array_equal(done.layers["blocks.0"].act_divisor, divisors[helps])


def test_only_the_trial_that_is_learned_from_keeps_what_learning_takes(spiky, calib, monkeypatch):
    """Moments and float64 weights of a stage's layers are half a gigabyte in SD3-Medium's blocks."""
    losers, transform = [], Sweep._transform

    def watched(self, stage, rounding, start, *rest):
        made, trial = [start], rounding.transformed
        rounding.transformed = lambda *given: (made.append(trial(*given)), made[-1])[1]
        best, facts = transform(self, stage, rounding, start, *rest)
        losers.extend(trial for trial in made if trial is not best)
        assert best.goals or not start.layers
        return best, facts

    monkeypatch.setattr(Sweep, "_transform", watched)
    recipe = parse_recipe("gptq+smoothquant+rotation+learned-w4a16")
    mq.quantize(spiky, calib, replace(recipe, learning=replace(recipe.learning, iterations=1)))
    assert losers
    assert not any(trial.goals for trial in losers)


def test_a_branch_that_hurts_is_left_out_and_what_comes_after_goes_on_without(spiky, calib, monkeypatch):
    def noise(weight, moments, rank, quantize):
        rng = np.random.default_rng(0)
        return LowRank(
            rng.normal(size=(len(weight), rank)).astype(np.float16),
            rng.normal(size=(rank, weight.shape[1])).astype(np.float16),
        )

    good = mq.quantize(spiky, calib, "gptq+svd2+smoothquant-w4a8")
    monkeypatch.setitem(registry._METHODS, ("branch", "svd"), replace(registry.get("branch", "svd"), function=noise))
    monkeypatch.setattr(layer_rounding, "refitted", lambda branch, *rest: branch)
    done, plain = (mq.quantize(spiky, calib, f"gptq{branch}+smoothquant-w4a8") for branch in ("+svd2", ""))
    blocks = [stage for stage in done.facts["stages"] if stage["stage"].startswith("multimodal")]
    assert all(stage["kept"].startswith("without branch") for stage in blocks)
    assert all(layer.branch is None for layer in done.layers.values())
    assert [s["error"] for s in blocks] == [
        s["error"] for s in plain.facts["stages"] if s["stage"].startswith("multimodal")
    ]
    assert any(layer.branch is not None for layer in good.layers.values())
    assert all(stage["error"] <= stage["errors"].get("without branch", np.inf) for stage in good.facts["stages"])


def test_a_shift_that_hurts_is_left_out(spiky, calib, monkeypatch):
    table = rounding.choose_table

    def spoilt(seen, spec, after, rounded):
        found = table(seen, spec, after, rounded)
        return replace(found, step=found.step * 9) if spec.shift and after == [(None, "gelu")] else found

    monkeypatch.setattr(rounding, "choose_table", spoilt)
    done, plain = (mq.quantize(spiky, calib, f"gptq{shift}-w8a8") for shift in ("+shift", ""))
    blocks = [stage for stage in done.facts["stages"] if stage["stage"].startswith("multimodal")]
    assert {stage["kept"] for stage in blocks} == {"without shift"}
    np.testing.assert_array_equal(velocity(done), velocity(plain))


def test_nothing_is_tried_without_what_no_layer_has(spiky, calib):
    stages = mq.quantize(spiky, calib, "gptq-w4a8").facts["stages"]
    assert {name for stage in stages for name in stage["errors"]} == {"calibrated", "rtn"}


def test_the_damping_of_a_branch_is_recorded(spiky, calib):
    done = mq.quantize(spiky, calib, "gptq+whitened2-w4a8")
    rows = [row for stage in done.facts["stages"] for row in stage["layers"].values()]
    assert {row["branch_damping"] for row in rows if "branch_damping" in row} <= set(DAMPINGS)
    assert any("branch_damping" in row for row in rows)


def test_damping_is_chosen_and_recorded(spiky, calib):
    done = mq.quantize(spiky, calib, "gptq+damped-w4a16")
    rows = [row for stage in done.facts["stages"] for row in stage["layers"].values()]
    assert {row["damping"] for row in rows if "damping" in row} <= {0.003, 0.01, 0.03, 0.1, 0.3}
    assert sum("damping" in row for row in rows) > 10
    aimed = mq.quantize(spiky, calib, "gptq+corrected+damped-w4a16")
    rows = [row for stage in aimed.facts["stages"] for row in stage["layers"].values()]
    assert {row["target_damping"] for row in rows if "target_damping" in row} <= {1e-4, 1e-3, 1e-2, 1e-1}
    assert all(("target_damping" in row) == ("damping" in row) for row in rows)


@pytest.mark.parametrize(
    "recipe",
    [
        "qronos-w4a8",
        "gptaq-w4a8",
        "gptq+corrected+damped-w4a8",
        "descent+refit-w3a16",
        "gptq+regrid-w3a16",
        "svdquant-w4a4",
    ],
)
def test_methods_run_end_to_end_and_beat_rounding(spiky, calib, recipe):
    done = mq.quantize(spiky, calib, recipe)
    compared = [stage for stage in done.facts["stages"] if "rtn" in stage["errors"]]
    assert all(stage["error"] <= stage["errors"]["rtn"] for stage in compared)
    assert any(stage["kept"].startswith("calibrated") for stage in compared)


def test_a_second_round_calibrates_on_what_the_quantized_model_draws(spiky, calib, tmp_path):
    once, twice = (
        mq.quantize(spiky, calib, f"{name}-w4a4", work=tmp_path / name) for name in ("gptq", "gptq+progressive")
    )
    latents = [
        read_tensors(path, "calibration-batch")[0]["latents"]
        for path in (tmp_path / "gptq+progressive").rglob("calibration/*.safetensors")
    ]
    assert len(latents) == 1
    assert latents[0].shape == calib.latents.shape
    np.testing.assert_array_equal(np.array(latents[0][0]), np.array(calib.latents[0]))  # the same noise
    drawn = once.images(list(calib.prompts), steps=3)
    assert np.abs(drawn - spiky.images(list(calib.prompts), steps=3)).max() > 0
    assert not np.array_equal(np.array(latents[0][-1]), np.array(calib.latents[-1]))
    assert any(
        not np.array_equal(value, arrays(once)[name]) for name, value in arrays(twice).items() if name in arrays(once)
    )


def test_probabilities_are_quantized_and_survive_the_disk(spiky, calib, tmp_path):
    done, plain = (mq.quantize(spiky, calib, f"gptq{extra}-w8a16") for extra in ("+softmax4", ""))
    assert len(find_quantized_attentions(done.adapter.module)) == len(spiky.adapter.attentions()) > 0
    assert not np.array_equal(velocity(done), velocity(plain))
    done.save(tmp_path / "q")
    np.testing.assert_array_equal(velocity(mq.load(tmp_path / "q")), velocity(done))
    np.testing.assert_array_equal(velocity(mq.Model(done.clone())), velocity(done))


def test_a_model_whose_attention_cannot_be_opened_says_so():
    chain = mq.Model(Chain())
    with pytest.raises(RecipeError, match="attention of chain cannot be opened"):
        mq.quantize(chain, mq.calibrate(chain, prompts=2, steps=2), "gptq+softmax8-w4a8")


def test_bits_are_given_where_they_buy_most(spiky, calib):
    done, uniform = (mq.quantize(spiky, calib, f"{method}-w4a16") for method in ("mixed", "gptq+sensitivity"))
    assert done.size.bits_per_quantized_weight <= uniform.size.bits_per_quantized_weight
    assert len({layer.format.bits for layer in done.layers.values()}) > 2
    assert done.facts["allocation"]["layers"].keys() == done.layers.keys()


def test_a_limit_that_cannot_be_met_is_refused_before_anything_long(spiky):
    with pytest.raises(RecipeError, match=r"2\.1 bits per weight cannot be met"):
        plan(spiky, parse_recipe("gptq+mixed2.1-w4a8"))
