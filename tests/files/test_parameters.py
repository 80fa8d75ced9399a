"""Parameters go into a module where they fit exactly, or not at all."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.files.parameters import load_parameters


@pytest.fixture
def layer():
    """A layer in half precision."""
    made = nn.Linear(3, 2)
    made.set_dtype(mx.float16)
    return made


def test_they_come_in_the_dtypes_that_the_module_has(layer):
    load_parameters(layer, {"weight": mx.full((2, 3), 0.5), "bias": mx.ones((2,))}, "x")
    assert layer.weight.tolist() == [[0.5] * 3] * 2
    assert layer.bias.tolist() == [1, 1]
    assert {layer.weight.dtype, layer.bias.dtype} == {mx.float16}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weight": (2, 3)}, r"x: does not fit the model: missing \['bias'\], unexpected nothing \(1 and 0 in all\)"),
        (
            {"weight": (2, 3), "bias": (2,), "scale": (1,)},
            r"missing nothing, unexpected \['scale'\] \(0 and 1 in all\)",
        ),
        ({"weight": (3, 2), "bias": (2,)}, r"x: weight has shape \(3, 2\), the model expects \(2, 3\)"),
    ],
)
def test_others_are_refused_and_change_nothing(layer, arrays, message):
    before = layer.weight.tolist()
    with pytest.raises(ArtifactError, match=message):
        load_parameters(layer, {name: mx.zeros(shape) for name, shape in arrays.items()}, "x")
    assert layer.weight.tolist() == before
