"""One table of kinds: whatever it holds can be made, rebuilt, and stands for what it says."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.grids.weights import WeightFormat
from mlxquant.layers.kinds import BY_NAME, KINDS, blanks, find_layers, kind_of, rebuilt, refresh
from mlxquant.layers.packed import QuantizedLayer
from mlxquant.layers.tree import parameters, set_module

from support.exact_layers import MADE


def subclasses(kind):
    return {one for direct in kind.__subclasses__() for one in {direct, *subclasses(direct)}}


def test_every_layer_of_ours_is_in_the_table():
    ours = {one for one in subclasses(QuantizedLayer) if one.__module__.startswith("mlxquant.")}
    assert {
        one for one in ours if "convolve" in vars(one) or not one.__name__.endswith(("Convolution", "Product"))
    } == {*BY_NAME.values()}
    assert {kind.replaces for kind in KINDS} == MADE.keys()
    assert all(one.replaces is kind.replaces for kind in KINDS for one in kind.classes)


@pytest.mark.parametrize("text", ["w8", "w4-asym", "w5-tensor"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replaces.__name__)
def test_a_layer_is_made_found_and_rebuilt(kind, text):
    exact = MADE[kind.replaces]()
    assert kind_of(exact) is kind
    layer = kind.quantized(exact, WeightFormat.parse(text), "extremes")
    assert type(layer) in kind.classes
    assert (layer.shape, layer.differences(exact)) == (exact.weight.shape, None)
    assert layer.differences(MADE[kind.replaces]().update({"weight": mx.zeros((2, 2))})).startswith("the model's has")
    assert kind_of(layer) is None

    holder = nn.Sequential(layer)
    assert find_layers(holder) == {"layers.0": layer}
    (twin,) = blanks(holder, None).values()
    named = rebuilt({"class": type(layer).__name__, **layer.facts}, None)
    for again in (twin, named):
        assert (type(again), again.facts, again.nbytes) == (type(layer), layer.facts, layer.nbytes)
        again.load_weights(list(parameters(layer).items()))
        set_module(holder, "layers.0", again)
        refresh(holder)
        np.testing.assert_array_equal(np.array(again.dequantized()), np.array(layer.dequantized()))
        np.testing.assert_array_equal(again.codes(), layer.codes())


def test_a_module_of_another_class_is_of_no_kind():
    assert kind_of(nn.LayerNorm(4)) is None
    with pytest.raises(KeyError, match="Hologram"):
        rebuilt({"class": "Hologram"}, None)
