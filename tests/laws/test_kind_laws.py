"""Laws of every kind of layers under every registered method: what is said of a layer is what it does.

A kind shows methods a matrix and moments, whatever it is. So the error that is told of a rounded layer has to be that
of what the layer writes for the very calls that it was calibrated on; no method may leave more of it than rounding to
nearest does; and what stands in a model must run, be described and be rebuilt alike.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.grids.weights import WeightFormat
from mlxquant.layers.convolutions import POSITIONS
from mlxquant.layers.kinds import KINDS, kind_of, layer_facts, rebuilt
from mlxquant.layers.switch import SwitchLinear
from mlxquant.layers.tree import parameters
from mlxquant.methods import registry
from mlxquant.numerics.transform import Transform
from mlxquant.recipes.recipe import LayerSpec
from mlxquant.sweep.collecting import InputStatistics
from mlxquant.sweep.layer import quantize_layer

RNG = np.random.default_rng
LAYERS = {  # and the shape of an input
    "Linear": (lambda: nn.Linear(32, 6), (2, 20, 32)),
    "Embedding": (lambda: nn.Embedding(10, 16), None),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1), (2, 21, 6)),
    "Conv2d": (lambda: nn.Conv2d(4, 5, 3, padding=1, dilation=2, bias=False), (2, 7, 6, 4)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 4, 5, 4, 2)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (2, 6, 7, 8)),
    "depthwise": (lambda: nn.Conv1d(5, 5, 4, padding=3, groups=5), (2, 20, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 9, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (2, 5, 4, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 3, 3, 2, 2)),
    "experts": (lambda: SwitchLinear(16, 6, 3), None),
}
WAYS = {
    **{f"round {m.name}": {"rounding": m.name} for m in registry.members("round")},
    **{f"steps {m.name}": {"rounding": "gptq", "steps": m.name} for m in registry.members("steps")},
    **{f"refine {m.name}": {"rounding": "gptq", "refine": m.name} for m in registry.members("refine")},
    **{f"branch {m.name}": {"rounding": "gptq", "branch": m.name, "rank": 2} for m in registry.members("branch")},
    "damped": {"rounding": "gptq", "held_out": True},
}


def built(name):
    """A layer with weights that are the same every time, and calls of it."""
    make, shape = LAYERS[name]
    layer, rng = make(), RNG(len(name))
    layer.update({k: mx.array(rng.normal(size=v.shape).astype(np.float32)) for k, v in layer.parameters().items()})
    if name == "Embedding":
        return layer, [(mx.array(rng.integers(0, 8, (2, 9))),) for _ in range(4)]  # two rows are never asked for
    if name == "experts":
        x = mx.array(rng.normal(size=(2, 20, 1, 1, 16)).astype(np.float32))
        return layer, [(x * scale, mx.array(rng.integers(0, 2, (2, 20, 2)))) for scale in (1, 2, 3, 4)]
    return layer, [(mx.array(rng.normal(size=shape).astype(np.float32) * scale),) for scale in (1, 2, 3, 4)]


def collected(layer, calls, **options):
    statistics = InputStatistics(layer, **options)
    for call in calls:
        statistics.add(call, 0.5, call)
    return statistics


def test_every_kind_is_here():
    assert {kind_of(make()).replaces for make, _ in LAYERS.values()} == {kind.replaces for kind in KINDS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_told_of_a_layer_is_what_it_does(name, way):
    exact, calls = built(name)
    moments = collected(exact, calls, hold_out=True).moments
    spec = LayerSpec(WeightFormat(3, symmetric=False), **WAYS[way])
    rounded = quantize_layer(exact, spec, moments, name, Transform())
    layer = rounded.layer
    assert type(layer) is kind_of(exact).classes[0]
    np.testing.assert_array_equal(layer.codes(), rounded.codes)

    bias = exact.pop("bias", None)
    plain = type(layer).blank(layer.facts, None)  # the outputs' error is relative to outputs without a bias
    plain.load_weights([(k, mx.zeros_like(v) if k == "bias" else v) for k, v in parameters(layer).items()])
    wrong, signal = 0.0, 0.0
    for call in calls:
        wrong += np.square(np.array(plain(*call)) - np.array(exact(*call))).sum(dtype=np.float64)
        signal += np.square(np.array(exact(*call))).sum(dtype=np.float64)
    assert rounded.error == pytest.approx(np.sqrt(wrong / signal), rel=2e-3)
    assert (bias is None) == ("bias" not in layer)

    nearest = quantize_layer(exact, LayerSpec(spec.weight, steps=spec.steps), moments, name, Transform())
    if not spec.held_out:
        assert rounded.error <= nearest.error * (1 + 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_rebuilt_from_what_it_says_of_itself(name):
    exact, calls = built(name)
    spec = LayerSpec(WeightFormat(4), rounding="gptq", branch="svd", rank=2)
    layer = quantize_layer(exact, spec, collected(exact, calls).moments, name, Transform()).layer
    (facts,) = layer_facts({name: layer}).values()
    again = rebuilt(facts, None)
    again.load_weights(list(parameters(layer).items()))
    again.refresh()
    assert (type(again), again.facts, again.rank) == (type(layer), layer.facts, 2 if name != "depthwise" else 1)
    np.testing.assert_array_equal(np.array(again(*calls[0])), np.array(layer(*calls[0])))


def test_an_expert_that_no_token_reached_is_rounded_to_nearest_and_it_says_so():
    exact, calls = built("experts")  # the third is never chosen
    moments = collected(exact, calls).moments
    assert moments.without_data == [2]
    rounded = quantize_layer(
        exact, LayerSpec(WeightFormat(4), rounding="gptq", steps="search"), moments, "x", Transform()
    )
    nearest = quantize_layer(exact, LayerSpec(WeightFormat(4)), moments, "x", Transform())
    assert rounded.facts == {"without_data": [2]}
    np.testing.assert_array_equal(rounded.codes[12:], nearest.codes[12:])
    assert (rounded.codes[:12] != nearest.codes[:12]).any()


def test_each_expert_is_rounded_for_its_own_tokens():
    """As if it were a Linear that had seen them."""
    exact, calls = built("experts")
    spec = LayerSpec(WeightFormat(3), rounding="gptq", steps="search")
    rounded = quantize_layer(exact, spec, collected(exact, calls).moments, "x", Transform())
    for expert in range(2):
        alone = nn.Linear(16, 6, bias=False)
        alone.weight = exact.weight[expert]
        own = [
            (mx.array(np.repeat(np.array(x)[:, :, 0], 2, axis=2)[np.array(chosen) == expert])[None],)
            for x, chosen in calls
        ]
        found = quantize_layer(alone, spec, collected(alone, own).moments, "x", Transform())
        np.testing.assert_array_equal(rounded.codes[6 * expert : 6 * expert + 6], found.codes)


def test_sorted_tokens_are_the_same_tokens():
    exact, calls = built("experts")
    x, chosen = calls[0]
    order = mx.argsort(chosen.flatten())
    flat = mx.repeat(x.reshape(-1, 1, 1, 16), 2, axis=1).reshape(-1, 1, 16)[order]
    here, there = (collected(exact, [call]).moments for call in ((x, chosen), (flat, chosen.flatten()[order], True)))
    for one, other in zip(here.parts, there.parts, strict=True):
        assert one.count == other.count
        np.testing.assert_allclose(one.gram, other.gram, rtol=1e-5, atol=1e-4)


def test_rows_of_a_table_count_as_often_as_they_are_asked_for():
    exact, calls = built("Embedding")
    moments = collected(exact, calls).moments
    counts = np.bincount(np.concatenate([np.array(x).ravel() for (x,) in calls]), minlength=10)
    np.testing.assert_array_equal(moments.looked_up, counts)
    change = RNG(0).normal(size=(10, 16))
    np.testing.assert_allclose(moments.errors(change), (counts[:, None] * np.square(change)).sum(0))
    assert moments.count == 4 * 18


def test_ranges_are_of_the_input_and_not_of_the_padding():
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x = 5 + mx.array(RNG(0).random((2, 4, 4, 2)).astype(np.float32))
    ranges = collected(layer, [(x,)], range_batch=1).ranges
    assert ranges.least.min() >= 5
    assert ranges.least.shape == (1, 18)
    np.testing.assert_array_equal(ranges.least[0, :2], np.array(x).min((0, 1, 2)))


def test_of_large_pictures_some_outputs_stand_for_all_and_it_says_so():
    layer, x = nn.Conv2d(2, 3, 3, padding=1), mx.array(RNG(0).normal(size=(2, 40, 40, 2)).astype(np.float32))
    moments = collected(layer, [(x,)]).moments
    assert moments.count == 2 * POSITIONS
    rounded = quantize_layer(layer, LayerSpec(WeightFormat(4), rounding="gptq"), moments, "x", Transform())
    assert rounded.facts == {"share_of_outputs": POSITIONS / 1600}
    wrong = np.square(np.array(rounded.layer(x) - layer(x))).sum()
    signal = np.square(np.array(layer(x) - layer.bias)).sum()
    assert rounded.error == pytest.approx(np.sqrt(wrong / signal), rel=0.1)
