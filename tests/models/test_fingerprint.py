"""The fingerprint of a model is that of the weights it has now, whatever was remembered before; and nothing is hashed
twice.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.files import checked
from mlxquant.files.array_memory import ArrayMemory
from mlxquant.files.checked import array_digest
from mlxquant.layers.tree import get_module, parameters, set_module
from mlxquant.models import adapter as adapter_module
from mlxquant.sweep.folding import divide

from support.tiny_pictures import tiny_adapter

FC2 = "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2"


def anew(adapter):
    """The fingerprint by its definition."""
    digests = {name: array_digest(mx.array(np.array(value))) for name, value in parameters(adapter.module).items()}
    return checked.digest(digests)


@pytest.fixture
def hashed(monkeypatch):
    """The shapes of all arrays that were hashed."""
    shapes = []

    def digest(value):
        shapes.append(value.shape)
        return array_digest(value)

    monkeypatch.setattr(adapter_module, "_digest", ArrayMemory(digest))
    return shapes


def replace_weight(adapter):
    layer = get_module(adapter.module, FC2)
    layer.weight = layer.weight + 1


def replace_layer(adapter):
    old = get_module(adapter.module, FC2)
    new = nn.Linear(old.weight.shape[1], old.weight.shape[0])
    new.load_weights([("weight", old.weight), ("bias", old.bias + 1)])
    set_module(adapter.module, FC2, new)


def load_weights(adapter):
    adapter.module.load_weights([(f"{FC2}.weight", get_module(adapter.module, FC2).weight * 2)], strict=False)


def change_dtype(adapter):
    adapter.module.set_dtype(mx.float16)


def fold(adapter):
    edge = next(edge for edge in adapter.edges() if edge.folds)
    width = get_module(adapter.module, edge.consumers[0]).weight.shape[1]
    divide(adapter.module, edge, np.linspace(0.5, 2, width).astype(np.float32))


def add_in_place(adapter):
    get_module(adapter.module, FC2).weight += 1


def add_in_place_twice(adapter):
    weight = get_module(adapter.module, FC2).weight
    for _ in range(2):
        weight += 1
        mx.eval(weight)


def set_one_number(adapter):
    get_module(adapter.module, FC2).weight[0, 0] = 7


def remove_bias(adapter):
    get_module(adapter.module, FC2).pop("bias")


CHANGES = [
    replace_weight, replace_layer, load_weights, change_dtype, fold, add_in_place, add_in_place_twice, set_one_number,
    remove_bias,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_weights_is_noticed(change):
    adapter = tiny_adapter()
    before = adapter.fingerprint
    assert adapter.fingerprint == before == anew(adapter)
    change(adapter)
    assert adapter.fingerprint == anew(adapter) != before


def test_what_is_undone_has_the_old_fingerprint():
    adapter = tiny_adapter()
    before = adapter.fingerprint
    edge = next(edge for edge in adapter.edges() if edge.folds)
    width = get_module(adapter.module, edge.consumers[0]).weight.shape[1]
    undo = divide(adapter.module, edge, np.linspace(0.5, 2, width).astype(np.float32))
    assert adapter.fingerprint != before
    undo()
    assert adapter.fingerprint == before


def test_an_array_is_hashed_once_also_in_a_clone(hashed):
    adapter = tiny_adapter()
    before = adapter.fingerprint
    count = len(hashed)
    assert count == len(parameters(adapter.module))
    clone = mq.Model(adapter).clone()
    assert adapter.fingerprint == clone.fingerprint == before
    assert len(hashed) == count
    replace_weight(clone)
    assert clone.fingerprint != before == adapter.fingerprint
    assert hashed[count:] == [get_module(adapter.module, FC2).weight.shape]


def test_replaced_weights_are_not_kept_in_memory():
    adapter = tiny_adapter()
    _ = adapter.fingerprint
    total = sum(value.nbytes for value in parameters(adapter.module).values())
    held = mx.get_active_memory()
    adapter.module.update(nn.utils.tree_map(lambda value: mx.zeros((0,)), adapter.module.parameters()))
    mx.eval(adapter.module.parameters())
    assert mx.get_active_memory() <= held - total
