"""Taps and swaps see every call and are always undone."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxquant.errors import AdapterError
from mlxquant.layers.tree import find_linears, get_module, set_module, starred, swapped, tapped


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = [nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4)) for _ in range(11)]
        self.head = nn.Linear(4, 2)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_linears_are_found_in_numeric_order():
    paths = list(find_linears(Net()))
    assert len(paths) == 23
    assert paths[:3] == ["blocks.0.layers.0", "blocks.0.layers.2", "blocks.1.layers.0"]
    assert paths.index("blocks.2.layers.0") < paths.index("blocks.10.layers.0")


def test_layers_of_all_blocks_share_a_starred_name():
    assert starred("blocks.10.image.mlp.fc1") == starred("blocks.2.image.mlp.fc1") == "blocks.*.image.mlp.fc1"
    assert starred("head") == "head"


def test_tap_sees_the_input_and_changes_nothing():
    net, x, seen = Net(), mx.ones((3, 4)), []
    expected = net(x)
    with tapped(net, ["blocks.3.layers.2", "head"], lambda path, value: seen.append((path, value.shape))):
        assert mx.array_equal(net(x), expected)
    assert seen == [("blocks.3.layers.2", (3, 4)), ("head", (3, 4))]
    assert isinstance(net.head, nn.Linear)


def test_taps_are_removed_after_an_exception():
    net = Net()
    before = net.head

    def fail(path, value):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), tapped(net, ["head", "blocks.0.layers.0"], fail):
        net(mx.ones((1, 4)))
    assert net.head is before
    assert isinstance(get_module(net, "blocks.0.layers.0"), nn.Linear)


def test_swap_is_undone():
    net, zero = Net(), nn.Linear(4, 2)
    before = net.head
    with swapped(net, {"head": zero}):
        assert net.head is zero
    assert net.head is before
    assert set_module(net, "head", zero) is before


def test_unknown_path_is_refused():
    with pytest.raises(AdapterError, match=r"'blocks\.11\.layers\.0'"):
        get_module(Net(), "blocks.11.layers.0")
