"""A model of every kind of layers goes through the sweep like one of Linears: rounded for what its layers read, saved,
resumed, cloned, exported, allocated; and what a kind cannot do is said.
"""

from dataclasses import replace

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.api.plan import of_first_blocks, plan
from mlxquant.errors import ExportError, RecipeError
from mlxquant.evaluation.layer_report import layer_report
from mlxquant.exporters.plain import plain_module
from mlxquant.grids.weights import WeightFormat
from mlxquant.layers.convolutions import QuantizedConv2d, QuantizedConvTranspose2d
from mlxquant.layers.embeddings import QuantizedEmbedding
from mlxquant.layers.module_files import load_module, save_module
from mlxquant.layers.switch import QuantizedSwitchLinear
from mlxquant.layers.tree import parameters
from mlxquant.numerics.transform import Transform
from mlxquant.progress import silent
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.recipes.recipe import LayerSpec
from mlxquant.sweep.collecting import InputStatistics
from mlxquant.sweep.layer import quantize_layer
from mlxquant.sweep.share import planned_share

from support.kinds_chain import Kinds

CLASSES = {
    "embed": QuantizedConv2d,
    "down": QuantizedConv2d,
    "grouped": QuantizedConv2d,
    "up": QuantizedConvTranspose2d,
    "experts": QuantizedSwitchLinear,
    "head": QuantizedConv2d,
    "context": mq.QuantizedLinear,
}
INPUTS = {"down", "grouped", "up", "experts"}  # that a recipe with a8 quantizes


@pytest.fixture(scope="module")
def model():
    return mq.Model(Kinds())


@pytest.fixture(scope="module")
def calib(model):
    return mq.calibrate(model, prompts=4, steps=3)


def velocity(model, sigma=0.7):
    text = model.adapter.encode(["a", "bb"])
    latent = mx.random.normal((2, *model.adapter.latent_shape), key=mx.random.key(5))
    return np.array(model.adapter.velocity(latent, text, sigma))


def arrays(model):
    return {name: np.array(value) for name, value in parameters(model.module).items()}


def same(one, other):
    ours, theirs = arrays(one), arrays(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(value, theirs[name]) for name, value in ours.items())


RECIPES = ["rtn-w8a16", "gptq-w4a8", "gptq+embeddings+svd2-w4a8-asym-token", "qronos-w4a8-static"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_kind_is_quantized_and_comes_back(model, calib, tmp_path, recipe):
    before = arrays(model)
    done = mq.quantize(model, calib, recipe)
    classes = CLASSES | ({"levels": QuantizedEmbedding} if "embeddings" in recipe else {})
    assert {path: type(layer) for path, layer in done.layers.items()} == classes
    inputs = {path for path, layer in done.layers.items() if layer.input_bits < 16}
    assert inputs == (set() if "a16" in recipe else INPUTS)
    assert np.linalg.norm(velocity(done) - velocity(model)) < (0.1 if "w8" in recipe else 0.7) * np.linalg.norm(
        velocity(model)
    )
    assert all(np.array_equal(value, before[name]) for name, value in arrays(model).items())

    done.save(tmp_path / "q")
    again = mq.load(tmp_path / "q")
    assert same(again, done)
    assert again.size == done.size
    np.testing.assert_array_equal(velocity(again), velocity(done))
    np.testing.assert_array_equal(velocity(mq.Model(done.clone())), velocity(done))


def test_a_killed_sweep_ends_with_the_same_bytes(model, calib, tmp_path):
    whole = mq.quantize(model, calib, "gptq+embeddings-w4a8")
    mq.quantize(model, calib, "gptq+embeddings-w4a8", work=tmp_path)
    (tmp_path / "convolutions.safetensors").unlink()
    assert same(mq.quantize(model, calib, "gptq+embeddings-w4a8", work=tmp_path), whole)


def test_codes_are_learned_through_every_kind(model, calib):
    recipe = parse_recipe("adaround+embeddings-w3a8", ["@embedder=w3a8", "@output=w3a16"])
    done = mq.quantize(model, calib, replace(recipe, learning=replace(recipe.learning, iterations=60)))
    for stage in done.facts["stages"]:
        assert stage["errors"]["learned"] < 1.05 * stage["errors"]["rtn"], stage["stage"]
        assert stage["learning"]["flipped"] > 0


@pytest.mark.parametrize("recipe", ["gptq+mixed-w4a8", "taqdit-w4a8"])
def test_sensitivities_are_of_what_each_kind_writes(model, calib, recipe):
    recipe = parse_recipe(recipe)
    done = mq.quantize(model, calib, replace(recipe, learning=replace(recipe.learning, iterations=2)))
    assert set(done.layers) == set(CLASSES)
    if "allocation" in done.facts:
        assert all(row["error"] > 0 for row in done.facts["allocation"]["layers"].values())
        assert done.size.bits_per_quantized_weight <= done.facts["allocation"]["bits_per_weight"] + 1e-9


def test_gptq_on_a_convolution_is_the_papers_on_its_patches():
    """Against the algorithm as it is written, in float64, on patches that a loop cut out."""
    layer, rng = nn.Conv2d(3, 4, 3, stride=2, padding=1), np.random.default_rng(0)
    layer.weight = mx.array(rng.normal(size=layer.weight.shape).astype(np.float32))
    x = rng.normal(size=(6, 9, 9, 3)).astype(np.float32) * np.float32([1, 4, 0.3])
    statistics = InputStatistics(layer)
    statistics.add((mx.array(x),), 0.5)
    spec = LayerSpec(WeightFormat(3), rounding="gptq")
    rounded = quantize_layer(layer, spec, statistics.moments, "conv", Transform())

    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = np.array(
        [one[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].ravel() for one in padded for i in range(5) for j in range(5)]
    )
    hessian = rows.T @ rows
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(27)
    order = np.argsort(np.diag(hessian), kind="stable")[::-1]  # of taps that read the same values, the last first
    weight = np.array(layer.weight, np.float64).reshape(4, 27)[:, order]
    scales = rounded.layer.grid().scales.astype(np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    codes = np.zeros((4, 27), int)
    for i in range(27):
        codes[:, i] = np.clip(np.rint(weight[:, i] / scales[:, 0]), -4, 3)
        error = (weight[:, i] - codes[:, i] * scales[:, 0]) / upper[i, i]
        weight[:, i:] -= np.outer(error, upper[i, i:])
    expected = np.zeros_like(codes)
    expected[:, order] = codes
    exact = np.array(layer.weight, np.float64).reshape(4, 27)
    nearest = np.clip(np.rint(exact / scales), -4, 3).astype(int)
    ours, theirs = (np.square(rows @ (exact - found * scales).T).sum(0) for found in (expected, nearest))
    expected = np.where((ours > theirs)[:, None], nearest, expected)  # the guard, which the paper does not have
    assert (ours < theirs).any()
    np.testing.assert_array_equal(rounded.codes.astype(int) - 4, expected)


def test_what_a_kind_cannot_do_is_said_and_not_tried(model, calib):
    done = mq.quantize(model, calib, "gptq+smoothquant+shift-w4a8")
    others = ["down", "experts", "grouped", "up"]
    assert done.facts["left_undone"] == {"smoothquant": others, "shift": others}
    streams = mq.quantize(model, calib, "gptaq-w4a16")
    assert streams.facts["left_undone"] == {"both streams": ["experts"]}
    assert "left_undone" not in mq.quantize(model, calib, "gptq-w4a16").facts


def test_one_scale_for_several_parts_is_refused(model, calib):
    with pytest.raises(RecipeError, match=r"layer experts: .*tensor of 3 parts .* use a scale a row, or a group"):
        mq.quantize(model, calib, "gptq-w4a16-tensor")
    kept = parse_recipe("gptq-w4a16-tensor", ["experts=keep", "grouped=w4a16"])
    assert mq.quantize(model, calib, kept).layers["down"].scales.size == 1


def test_embeddings_stay_unless_they_are_asked_for(model):
    def taken(name, *overrides):
        return plan(model, parse_recipe(name, overrides)).get("levels")

    assert taken("gptq-w4a8") is None
    assert taken("gptq-w4a8", "*=w8a8") is None
    for asked in (
        taken("gptq+embeddings-w4a8"),
        taken("gptq-w8a8", "@embedding=w4a8"),
        taken("rtn-w8a8", "levels=w4a4"),
    ):
        assert (asked.weight, asked.activation, asked.transforms) == (WeightFormat(4), None, ())
    assert taken("gptq+embeddings-w4a8", "levels=keep") is None


def test_what_stays_in_float_is_counted_by_reason(model):
    layers = plan(model, parse_recipe("gptq-w4a16", ["@output=keep"]))
    share = planned_share(model.adapter, layers)
    sizes = {name: value.size for name, value in parameters(model.module).items()}
    assert share.all.numbers == sum(sizes.values())
    assert share.quantized.numbers == sum(sizes[f"{path}.weight"] for path in layers)
    assert {reason: amount.numbers for reason, amount in share.kept.items()} == {
        "embedding": sizes["levels.weight"],
        "bias": sum(size for name, size in sizes.items() if name.endswith("bias")),
        "in stages that the recipe leaves alone": sizes["head.weight"],
    }
    assert share.nbytes == pytest.approx(share.parameters)  # all float32
    assert "% (embedding)" in str(share)
    assert planned_share(model.adapter, plan(model, parse_recipe("gptq+embeddings-w4a16"))).parameters > 0.95
    share.require(share.parameters, "it")
    with pytest.raises(
        RecipeError, match=r"recipe it quantizes 9\d\.\d % of the parameters, and 99.0 % are required; .*"
    ):
        share.require(0.99, "it")


def test_the_share_of_blocks_tells_what_is_around_them(model):
    recipe = of_first_blocks(model, parse_recipe("gptq-w4a16"), 1)
    kept = planned_share(model.adapter, plan(model, recipe)).kept
    assert set(kept) == {"in stages that the recipe leaves alone", "embedding", "bias"}


def test_an_export_has_what_it_can_and_the_rest_beside(model, calib, tmp_path):
    done = mq.quantize(model, calib, "gptq-w4a16")
    mq.export(done, tmp_path / "mlx", "mlx")
    again = mq.load(tmp_path / "mlx")
    np.testing.assert_array_equal(velocity(again), velocity(done))
    quantized = mq.quantize(model, calib, "gptq-w4a8-token")
    mq.export(quantized, tmp_path / "dropped", "mlx", drop_activations=True)
    assert all(layer.input_bits == 16 for layer in mq.load(tmp_path / "dropped").layers.values())
    with pytest.raises(ExportError, match=r"layers.0 has a QuantizedConv2d, a layer of mlxquant's own"):
        plain_module(nn.Sequential(done.layers["down"]), "it")


def test_a_report_on_layers_has_every_kind(model, calib):
    done = mq.quantize(model, calib, "gptq+embeddings-w4a8")
    facts = layer_report(model, done, calib, silent)
    assert {row["path"]: row["shape"] for row in facts["layers"]}["experts"] == [48, 16]
    assert {row["path"] for row in facts["layers"]} == {*CLASSES, "levels"}
    assert all(np.isfinite(row["error"]).all() for row in facts["layers"])


def test_a_module_file_has_every_kind(model, calib, tmp_path):
    done = mq.quantize(model, calib, "gptq+embeddings+svd2-w4a8-token")
    save_module(done.module, tmp_path / "m.safetensors")
    fresh = Kinds()
    load_module(fresh.module, tmp_path / "m.safetensors")
    np.testing.assert_array_equal(velocity(mq.Model(fresh)), velocity(done))
