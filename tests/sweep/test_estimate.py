"""The arithmetic of what a sweep takes, by hand."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxquant.models.recorded.outline import outlined, unevaluated
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sweep.estimate import COLUMNS, NEAREST, SEARCH, TABLE, estimated, rounded_to_nearest


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_q, self.attn_k, self.fc = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def __call__(self, x, condition):
        return x + self.fc(self.attn_q(x) * self.attn_k(x)) + condition[:, None]


class Net(nn.Module):
    """Two blocks between an embedder and an output, with a conditioning that is made before them."""

    def __init__(self):
        super().__init__()
        self.first, self.time, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.blocks = [Block(), Block()]

    def __call__(self, x, condition):
        x, condition = self.first(x), self.time(condition)
        for block in self.blocks:
            x = block(x, condition)
        return self.last(x)


@pytest.fixture
def outline():
    module, args = Net(), (mx.zeros((2, 5, 64)), mx.zeros((2, 64)))
    before = mx.get_active_memory()
    found = outlined(module, args, lambda: module(*args))[1]
    assert mx.get_active_memory() <= before  # nothing was computed
    return found


def test_a_call_shows_its_layers(outline):
    assert list(outline.layers)[:4] == ["first", "time", "blocks.0.attn_q", "blocks.0.attn_k"]
    roles = {path: outline.roles[path] for path in ("first", "time", "blocks.0.attn_q", "blocks.1.fc", "last")}
    assert roles == {
        "first": "embedder", "time": "embedder", "blocks.0.attn_q": "attention", "blocks.1.fc": "mlp", "last": "output",
    }  # fmt: skip
    reading = outline.layers["blocks.0.attn_k"]
    assert (reading.shape, reading.rows, reading.stage, reading.leader) == ((64, 64), 10, "blocks.0", "blocks.0.attn_q")
    assert outline.layers["blocks.0.fc"].leader == "blocks.0.fc"
    assert outline.layers["time"].rows == 2
    assert (outline.layers["first"].stage, outline.layers["last"].stage) == ("before block 0", "before block 2")
    assert outline.state == 2 * 5 * 64 + 2 * 64
    assert outline.given == 4 * (2 * 2 * 5 * 64 + 2 * 64)
    assert outline.operations == 2 * 64 * 64 * (8 * 10 + 2)


def planned(outline, recipe):
    return recipe.plan(outline.roles)


def test_memory_and_operations(outline):
    recipe = parse_recipe("gptq-w4a16-g64")
    work, square = estimated(outline, planned(outline, recipe), recipe, calls=3), 64 * 64
    assert work.streams == 3 * 3 * outline.state * 4
    assert (
        work.moments == 2 * 4 * square
    )  # of the stage before the blocks; a block has as many: q and k read one tensor
    assert work.rounding == 5 * square + COLUMNS * square + 2 * 2 * (square + 4 * 64)  # embedders have 8 bits
    assert work.forward == 4 * 3 * outline.operations  # exact, for the moments, and two trials
    tokens = 3 * (10 * 6 + 2)  # of the six tensors of tokens and the conditioning, each once
    each = 4 * square * 64 + (2 * 64**3) // 3 + 2 * square * 64 + (2 * NEAREST + SEARCH) * square
    assert work.matrices == tokens * square + 9 * each
    assert work.uncounted == ""


@pytest.mark.parametrize(
    ("name", "passes", "streams"),
    [
        ("rtn-w4a16-g64", 3, 3),
        ("gptq+corrected-w4a16-g64", 11, 4),
        ("qronos-w4a16-g64", 11, 4),
        ("gptq+rotation-w4a8", 6, 3),
    ],
)
def test_recipes_take_as_many_passes_as_they_say(outline, name, passes, streams):
    recipe = parse_recipe(name)
    work = estimated(outline, planned(outline, recipe), recipe, calls=1)
    assert work.forward == passes * outline.operations
    assert work.streams == streams * outline.state * 4


def test_tuned_scales_are_forward_passes(outline):
    """Targets once, four passes for each sample of a step, and what is held out now and then."""
    plain, tuned = parse_recipe("gptq-w4a16-g64"), parse_recipe("gptq+tuned-w4a16-g64")
    works = [estimated(outline, planned(outline, recipe), recipe, 16) for recipe in (plain, tuned)]
    more = works[1].forward - works[0].forward
    assert more == (16 + 4 * 300 * 12 + 15 * 2) * outline.operations
    assert works[1].streams == works[0].streams  # 16 calls at once are more than one call at each stage
    works = [estimated(outline, planned(outline, recipe), recipe, 1) for recipe in (plain, tuned)]
    assert works[1].streams >= works[0].streams


def test_what_nobody_has_counted_is_named(outline):
    recipe = replace(parse_recipe("adaround-w4a16-g64"), sensitivity=True)
    assert estimated(outline, planned(outline, recipe), recipe, 1).uncounted == "learning, sensitivities"


def test_rounding_to_nearest_holds_what_was_and_what_comes():
    work = rounded_to_nearest([(8, 64), (4, 64)], 100)
    assert (work.rounding, work.matrices, work.forward) == (TABLE * 512 + 100, NEAREST * 768, 0)


def test_code_that_asks_for_values_in_passing_gets_none_computed():
    before = mx.get_active_memory()
    with unevaluated():
        value = mx.ones((256, 256)) + 1
        mx.eval(value)
        assert mx.get_active_memory() < before + value.nbytes
    mx.eval(value)
    assert mx.get_active_memory() >= before + value.nbytes


def test_two_sided_rounding_holds_gradients_and_factors(outline):
    """Four stages of layers: what enters five of them twice, and two sketches and a gram of every layer, those of a
    stage once more while it is rounded.
    """
    one_sided, two_sided = parse_recipe("gptq-w4a16"), parse_recipe("kron-w4a16")
    layers = {path: outline.roles[path] for path in outline.layers}
    plain, found = (estimated(outline, recipe.plan(layers), recipe, 3) for recipe in (one_sided, two_sided))
    stages = len({one.stage for one in outline.layers.values()})
    factors = 4 * 5 * 64**2
    assert found.streams - plain.streams == 2 * (stages + 1) * 3 * outline.state * 4 + len(layers) * factors
    assert found.moments - plain.moments == 3 * factors
    assert found.rounding > plain.rounding
    assert found.uncounted == "the choice of a Hessian"
    assert not plain.uncounted
