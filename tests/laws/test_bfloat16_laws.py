"""A format that says ``-bf16`` has scales and biases that bfloat16 holds, whatever chose them, before it rounds codes.

So what a tool that runs bfloat16 reads is what was calibrated: nothing is rounded again when such a model is written.
"""

import mlxquant as mq  # before mlx

# isort: split
from dataclasses import replace
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.exporters.plain import plain_module
from mlxquant.grids.weights import GROUPS, Grid, WeightFormat, fit_extremes
from mlxquant.layers.kinds import KINDS, find_layers, rebuilt
from mlxquant.layers.tree import parameters
from mlxquant.methods import registry
from mlxquant.methods.weights.rtn import rtn
from mlxquant.numerics.moments import Moments
from mlxquant.numerics.part_moments import PartMoments
from mlxquant.numerics.transform import Transform
from mlxquant.recipes.recipe import LayerSpec
from mlxquant.sweep.layer import quantize_layer

from support.exact_layers import MADE

POWERS = (-120, -40, -14, -4, 0, 20)
FORMATS = [WeightFormat(*some).coarse for some in product(range(2, 9), ("tensor", "channel", *GROUPS), (True, False))]
STEPS = [pytest.param(method.function, id=method.name) for method in registry.members("steps")]
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)


@pytest.fixture(scope="module")
def weight():
    """Of rows that differ by three orders of magnitude, one of zeros and two of one sign."""
    random = np.random.default_rng(0)
    weight = random.standard_t(5, (12, 128)) * np.geomspace(1e-3, 1, 12)[:, None]
    weight[7] = 0
    weight[3], weight[4] = np.abs(weight[3]), -np.abs(weight[4])
    return weight.astype(np.float32)


@pytest.fixture(scope="module")
def moments():
    random = np.random.default_rng(1)
    seen = Moments.empty(128)
    tokens = random.standard_normal((400, 128)) @ random.standard_normal((128, 128)) / 8
    seen.add(tokens, tokens * random.normal(1, 0.1, tokens.shape))
    return seen


def coarse(values):
    """Whether bfloat16 holds them: what is below its 8 digits, in a float32 16 bits, is zero."""
    return not (np.ascontiguousarray(values, np.float32).view(np.uint32) & 0xFFFF).any()


def on_coarse_numbers(grid):
    assert coarse(grid.scales)
    assert coarse(grid.biases)
    assert (grid.scales > 0).all()


@every_format
def test_every_format_in_every_magnitude(format, weight):
    for power in POWERS:
        grid = fit_extremes(np.ldexp(weight, power), format)
        on_coarse_numbers(grid)
        if not format.symmetric and format.group != "tensor":
            assert (grid.biases[3] == 0).all()  # no weight below 0: 0 is the first code, exactly


@pytest.mark.parametrize("find", STEPS)
@pytest.mark.parametrize("format", [format for format in FORMATS if format.bits in (2, 4, 8)], ids=str)
def test_steps_that_are_searched_and_refitted(find, format, weight, moments):
    grid = find(weight, format, moments)
    on_coarse_numbers(grid)
    for method in registry.members("refine"):
        refined, _ = method.function(weight, grid, rtn(weight, grid), moments)
        assert refined.format == format
        on_coarse_numbers(refined)


def test_biases_that_are_smaller_than_every_scale():
    """bfloat16 has multiples of 2^-133 alone there, and a float32 would have more."""
    weight = np.ldexp(np.float32([[-1.2345e-4, 1.0], [-1.2345e-3, 100.0]]), -118)
    on_coarse_numbers(fit_extremes(weight, WeightFormat(4, symmetric=False).coarse))


SPECS = [
    LayerSpec(WeightFormat.parse("w4-g64-bf16"), rounding="gptq", steps="search", refine="refit"),
    LayerSpec(WeightFormat.parse("w4-g64-bf16"), rounding="gptq", steps="search", refine="regrid"),
    LayerSpec(WeightFormat.parse("w3-bf16"), rounding="gptq-descent", steps="mse", held_out=True),
    LayerSpec(WeightFormat.parse("w8-asym-bf16"), rounding="gptq", corrected=True, centred=True),
    LayerSpec(WeightFormat.parse("w2-g32-sym-bf16"), rounding="qronos", branch="whitened", rank=4),
    LayerSpec(WeightFormat.parse("w4-tensor-bf16"), rounding="gptaq", branch="svd", rank=4),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.rounding}-{spec.weight}")
def test_a_calibrated_layer_keeps_its_format_in_files(spec, weight, moments):
    linear = nn.Linear(128, 12)
    linear.weight = mx.array(weight)
    seen = Moments(moments.gram, moments.count, moments.cross, Moments(moments.gram / 4, 100, moments.cross / 4))
    made = quantize_layer(
        linear, spec, PartMoments.one(seen), "it", Transform(np.linspace(0.5, 2, 128), None, 16)
    ).layer
    on_coarse_numbers(made.grid())
    again = rebuilt(made.facts, None)
    again.load_weights(list(parameters(made).items()))
    assert again.format == spec.weight
    assert mx.array_equal(again.dequantized(), made.dequantized()).item()


@pytest.mark.parametrize("text", ["w2-bf16", "w8-asym-bf16", "w5-tensor-bf16", "w7-bf16"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replaces.__name__)
def test_every_kind_of_layer(kind, text):
    made = kind.quantized(MADE[kind.replaces](), WeightFormat.parse(text), "mse")
    on_coarse_numbers(made.grid())
    assert rebuilt({"class": type(made).__name__, **made.facts}, None).format == made.format


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def __call__(self, x):
        return x + self.fc2(nn.gelu(self.fc1(self.norm(x))))


class Residual(nn.Module):
    """Of layers wide enough for groups."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = [Block() for _ in range(2)], nn.Linear(64, 32)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("gptq+refit-w4a16-g32-bf16", {4, 8}),
        ("adaround-w3a16-bf16", {3, 8}),
        ("mixed-w4a16-g32-bf16", {2, 3, 4, 5, 6, 8}),
        ("gptq+mixed6-w4a8-asym-bf16-token", {4, 5, 6, 8}),
    ],
)
def test_recipes_give_it_to_every_layer_and_nothing_is_lost_in_bfloat16(name, bits):
    module, recipe = Residual(), mq.parse_recipe(name)
    recipe = replace(recipe, learning=replace(recipe.learning, iterations=4, batch=1))
    with mq.recording(module) as seen:
        for seed in range(4):
            module(mx.random.normal((2, 24, 64), key=mx.random.key(seed)))
    mq.quantize_module(module, seen, recipe)
    found = find_layers(module)
    assert {layer.format.digits for layer in found.values()} == {8}
    assert {layer.format.bits for layer in found.values()} <= bits
    plain = plain_module(module, "it", drop_activations=True)
    assert set(found) == set(plain.layers)
    written = plain.as_dtype("bfloat16")
    assert not any("no longer the calibrated ones" in note for note in written.notes)
    for path in found:
        for part in ("scales", "biases"):
            before, after = (p.arrays[f"{path}.{part}"].astype(mx.float32) for p in (plain, written))
            assert mx.array_equal(before, after).item()


def by_row(grid, codes, weight):
    return np.linalg.norm(grid.dequantize(codes) - weight, axis=1)


@every_format
def test_it_costs_little(format, weight):
    """Each code is the nearest on its scale: 8 digits cost what is cut off at the ends, where 8 bits reach 128 steps
    from zero. Where rows of all sizes share one range of which 0 is no code, small rows are where the nearest code is.
    """
    fine, coarse = (
        by_row(grid, grid.quantize(weight), weight)
        for grid in (fit_extremes(weight, replace(format, digits=digits)) for digits in (11, 8))
    )
    chance = format.group == "tensor" and not format.symmetric
    assert np.linalg.norm(coarse) <= (1.3 if chance else 1.06) * np.linalg.norm(fine)
    assert chance or (coarse <= 1.2 * fine).all()


@pytest.mark.parametrize("text", ["w8-asym", "w8-g64", "w8-g32"])
def test_rounding_scales_after_the_codes_costs_more(text, weight):
    """As the export of any other format has to: a third of the error of 8 bits, and more."""
    form = WeightFormat.parse(text)
    fine, coarse = (fit_extremes(weight, format) for format in (form, form.coarse))
    late = Grid(form, *(snapped(v) for v in (fine.scales, fine.biases)))
    after, before = by_row(late, fine.quantize(weight), weight), by_row(coarse, coarse.quantize(weight), weight)
    live = before > 0
    assert np.exp(np.log(after[live] / before[live]).mean()) > 1.3


def snapped(values):
    return np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32))
