"""What is planned is what is stored, for every format, kind of layer and shape; and numbers are counted once."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
from itertools import product
from math import prod

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.errors import RecipeError
from mlxquant.grids.weights import GROUPS, Grid, WeightFormat, fit_extremes
from mlxquant.layers.kinds import KINDS
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.sizes import (
    Size,
    numbers_in,
    planned_bits_per_weight,
    planned_bytes,
    planned_layer_bytes,
    scale_bytes,
    stored_bytes,
    weight_count,
)
from mlxquant.layers.tree import parameters
from mlxquant.numerics.low_rank import LowRank
from mlxquant.recipes.recipe import LayerSpec

from support.exact_layers import MADE

FORMATS = [WeightFormat(*some) for some in product(range(2, 9), ("tensor", "channel", *GROUPS), (True, False))]
SHAPES = [(8, 128), (5, 256), (1, 384), (4, 37), (3, 27), (6, 1), (2, 96)]


def layer(format, shape, **options):
    codes, ones = np.zeros(shape, np.uint8), np.ones((shape[0], shape[1] // format.columns(shape[1])))
    return QuantizedLinear(codes, Grid(format, ones, ones), **options)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_plan_has_the_bytes_of_the_layer(format):
    fitting = 0
    for shape in SHAPES:
        if isinstance(format.group, int) and shape[1] % format.group:
            with pytest.raises(RecipeError, match="do not divide"):
                planned_bytes(format, shape)
            continue
        made, fitting = layer(format, shape), fitting + 1
        blank = QuantizedLinear.blank(made.facts, None)
        assert planned_bytes(format, shape) == planned_bytes(LayerSpec(format), shape) == made.nbytes == blank.nbytes
        assert made.bits_per_weight == 8 * made.nbytes / prod(shape)
    assert fitting >= 2


@pytest.mark.parametrize("format", ["w3", "w4-g32", "w8-tensor", "w7-asym"])
@pytest.mark.parametrize("rank", [0, 3, 99])
def test_a_branch_is_counted(format, rank):
    form = WeightFormat.parse(format)
    for shape in ((8, 64), (5, 192)):
        small = min(rank, *shape)
        branch = LowRank(np.ones((shape[0], small)), np.ones((small, shape[1]))) if rank else None
        spec = LayerSpec(form, branch="svd" if rank else None, rank=rank)
        assert planned_bytes(spec, shape) == layer(form, shape, branch=branch).nbytes


def test_a_divisor_is_all_that_is_not_planned():
    form = WeightFormat(4)
    assert layer(form, (8, 64), divisor=mx.ones(64)).nbytes == planned_bytes(form, (8, 64)) + 4 * 64


@pytest.mark.parametrize("format", ["w2", "w3-asym", "w5-tensor", "w7", "w8"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replaces.__name__)
def test_a_plan_has_the_bytes_of_every_kind(kind, format):
    """Kernels of convolutions have ragged rows of 9, 27 and 81 codes."""
    exact, form = MADE[kind.replaces](), WeightFormat.parse(format)
    made = kind.quantized(exact, form, "extremes")
    assert planned_layer_bytes(LayerSpec(form), exact) == made.nbytes
    held = parameters(made)
    bias = held["bias"].nbytes if "bias" in held else 0
    assert made.nbytes + bias == stored_bytes(made) == sum(value.nbytes for value in held.values())
    assert weight_count(nn.Sequential(made)) == weight_count(nn.Sequential(exact))


def test_bits_per_weight_count_scales_and_whole_words():
    assert 8 * planned_bytes(WeightFormat.parse("w4-g128"), (128, 512)) / (128 * 512) == 4.25
    assert 8 * planned_bytes(WeightFormat.parse("w4"), (128, 512)) / (128 * 512) == 4 + 16 / 512
    assert 8 * planned_bytes(WeightFormat.parse("w3"), (1, 37)) == 4 * 32 + 16  # 111 bits of codes fill four words
    plan = {"a": LayerSpec(WeightFormat(8)), "b": LayerSpec(WeightFormat(4))}
    layers = {"a": nn.Linear(64, 2), "b": nn.Linear(64, 6), "c": nn.Linear(9, 9)}
    assert planned_bits_per_weight(plan, layers) == 5 + 16 / 64
    layers["b"].weight = 1e-6 * layers["b"].weight
    assert planned_bits_per_weight(plan, layers) == 5 + 16 / 64 + 16 / 64 * 6 / 8


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e8])
def test_scales_that_are_float32_are_counted(format, size):
    weight = size * np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    grid = fit_extremes(weight, format)
    made = QuantizedLinear(grid.quantize(weight), grid)
    wide = scale_bytes(format, mx.array(weight))
    assert (wide == 4) == (size != 1) == (made.scales.dtype == mx.float32)
    assert made.nbytes == planned_bytes(format, (8, 128), wide)
    assert planned_bytes(format, (8, 128)) == made.nbytes - made.scales.size * (0 if size == 1 else 2) * (
        1 if format.symmetric else 2
    )
    blank = QuantizedLinear.blank(made.facts, None)
    assert (blank.nbytes, blank.facts) == (made.nbytes, made.facts)


def test_a_weight_counts_once_and_what_reads_an_input_not_at_all():
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    grid = fit_extremes(weight, WeightFormat(4, 32, False))
    branch = LowRank(np.ones((8, 2)), np.ones((2, 64)))
    made = QuantizedLinear(grid.quantize(weight), grid, mx.zeros(8), mx.ones(64), 16, branch)
    made.quantize_tokens(8)
    arrays = {f"a.b.{name}": value for name, value in parameters(made).items()}
    arrays |= {"a.sdpa.act_step": mx.ones(3), "a.act_fn.weight": mx.ones(5), "norm.scales": mx.ones(7)}
    assert numbers_in(arrays.items(), {"a.b": 512}) == 512 + 8 + 5 + 7
    size = Size.of({"a.b": made}, arrays)
    assert size.model_bytes == sum(value.nbytes for value in arrays.values())
    assert size.bits_per_weight == 8 * size.model_bytes / 532
    assert size.bits_per_quantized_weight == 8 * planned_bytes(grid.format, (8, 64)) / 512 + 8 * (256 + 288) / 512
    assert Size.of({}, {"x": mx.ones(4, mx.float16)}) == Size(8, 16.0, None)


def test_layers_that_share_their_codes_count_once():
    one, other = (QuantizedLinear(np.zeros((4, 32), np.uint8), Grid.symmetric(WeightFormat(8), np.ones((4, 1))))
                  for _ in range(2))  # fmt: skip
    other.share_integers(one)
    assert weight_count(nn.Sequential(one, other)) == 128
    assert stored_bytes(nn.Sequential(one, other)) == one.nbytes
    theirs = nn.QuantizedLinear(64, 8, bias=True, group_size=32, bits=4)
    assert weight_count(nn.Sequential(theirs)) == 8 * 64 + 8
