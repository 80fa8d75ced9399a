"""What can be rounded together: layers that do not hang on each other, whatever they are called."""

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlxquant.layers.tree import tapped
from mlxquant.sweep.collecting import Sharing
from mlxquant.sweep.dependence import levels
from mlxquant.sweep.rounding import Rounding

from support.tiny_language import TEXT, gpt_folder


class Crossing(nn.Module):
    """a and b read the input; c what a writes, behind a ReLU and a maximum; d all; alone runs last and hangs on
    nothing.
    """

    def __init__(self):
        super().__init__()
        for name in ("a", "b", "c", "d", "alone"):
            setattr(self, name, nn.Linear(4, 4))

    def __call__(self, x):
        first, second = self.a(x), self.b(x)
        third = self.c(mx.maximum(nn.relu(first), 0.5))
        last = self.d(mx.softmax(second + third))
        return last + self.alone(mx.ones_like(x))


def leaders(module, paths, x):
    sharing = Sharing()
    with tapped(module, paths, sharing.leads):
        module(x)
    return {path: sharing[path] for path in sharing.leader}


def test_a_layer_comes_right_after_what_it_hangs_on():
    module, x = Crossing(), mx.ones((2, 4))
    before = module.a
    found = levels(module, lambda: module(x), leaders(module, ["d", "c", "b", "a", "alone"], x))
    assert [set(group) for group in found] == [{"a", "b", "alone"}, {"c"}, {"d"}]
    assert module.a is before


def test_what_is_not_among_the_layers_passes_dependence_on():
    module, x = Crossing(), mx.ones((2, 4))
    assert levels(module, lambda: module(x), leaders(module, ["a", "d"], x)) == [["a"], ["d"]]


class Late(nn.Module):
    """a and b read the input, only b goes on, into c; early runs after c, hangs on nothing, and goes into d, too."""

    def __init__(self):
        super().__init__()
        for name in ("a", "b", "c", "early", "d"):
            setattr(self, name, nn.Linear(4, 4))

    def __call__(self, x):
        first, third = self.a(x), self.c(nn.relu(self.b(x)))
        return self.d(third + self.early(mx.ones_like(x))) + first


def test_what_runs_late_and_hangs_on_nothing_brings_nobody_forward():
    module, x = Late(), mx.ones((2, 4))
    found = levels(module, lambda: module(x), leaders(module, ["b", "c", "early", "d"], x))
    assert [set(group) for group in found] == [{"b", "early"}, {"c"}, {"d"}]


def test_what_hangs_on_any_layer_of_a_group_comes_after_all_of_it():
    module, x = Late(), mx.ones((2, 4))
    assert levels(module, lambda: module(x), leaders(module, ["a", "b", "c"], x)) == [["a", "b"], ["c"]]


def test_nothing_is_no_group():
    assert levels(Crossing(), lambda: None, {}) == []


def test_a_gpt_block_is_rounded_in_the_order_in_which_it_runs(tmp_path, monkeypatch):
    """Its two outputs have the same name, ``c_proj``, and the second reads what the layer after the first writes."""
    groups, statistics = [], Rounding._statistics
    (tmp_path / "text.txt").write_text(TEXT)
    model = mq.load(gpt_folder(tmp_path / "gpt"))
    monkeypatch.setattr(
        Rounding, "_statistics", lambda self, paths, *rest: groups.append(paths) or statistics(self, paths, *rest)
    )
    mq.quantize(model, mq.calibrate_text(model, tmp_path / "text.txt", samples=2), "gptq+sequential-w4a16")
    block = [
        [path.removeprefix("model.h.0.") for path in group] for group in groups if group[0].startswith("model.h.0.")
    ]
    assert block == [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]
