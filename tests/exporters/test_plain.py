"""A module as other tools read one: what is refused, what may be dropped, and how files are split."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.errors import ExportError
from mlxquant.exporters.plain import plain_module, write_shards
from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.attention import QuantizedAttention, SoftmaxAttention
from mlxquant.layers.convolutions import QuantizedConvolution
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.tree import parameters

TABLE = ActivationTable(np.ones(1), np.ones(1), np.zeros((1, 1)), np.array([8]))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.sdpa = SoftmaxAttention()
        self.norm = nn.LayerNorm(64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = [Block(), Block()]
        self.head = nn.Linear(64, 40)


def rounded(linear, format="w4-g32", **options):
    weight = np.array(linear.weight)
    grid = fit_extremes(weight, WeightFormat.parse(format))
    return QuantizedLinear(grid.quantize(weight), grid, linear.bias, **options)


@pytest.fixture
def net():
    made = Net()
    for block in made.blocks:
        block.first = rounded(block.first)
    return made


def test_a_plain_module(net):
    plain = plain_module(net, "it")
    setting = {"group_size": 32, "bits": 4, "mode": "affine"}
    assert plain.layers == {"blocks.0.first": setting, "blocks.1.first": setting}
    assert plain.unquantized == ["blocks.0.second", "blocks.1.second", "head"]
    assert plain.usual == setting
    assert plain.arrays["blocks.1.first.biases"].shape == (64, 2)
    assert plain.weights == sum(v.size for v in plain_module(Net(), "it").arrays.values())
    assert plain.nbytes == sum(v.nbytes for v in plain.arrays.values())
    assert plain.notes == []
    assert plain_module(Net(), "it").usual is None


def test_activation_scales_are_refused_or_dropped(net):
    clock = Clock()
    for block in net.blocks:
        block.first.set_activations(TABLE, clock)
        block.sdpa = QuantizedAttention(TABLE, clock)
    message = (
        r"^blocks\.0\.first has static activation scales \(as have 3 more layers\), which mflux has no place for; "
        r"quantize with 16-bit activations, or pass --drop-activations to write the weights alone$"
    )
    with pytest.raises(ExportError, match=message):
        plain_module(net, "mflux")
    plain = plain_module(net, "mflux", drop_activations=True)
    assert not any(".act_" in name for name in plain.arrays)
    assert plain.notes == ["activation scales of 4 modules left out"]
    assert "blocks.0.first.act_step" in parameters(net)


def test_activations_that_are_scaled_token_by_token_too(net):
    net.blocks[1].first.quantize_tokens(8)
    with pytest.raises(ExportError, match=r"blocks\.1\.first has activations quantized a token, which"):
        plain_module(net, "it")
    assert plain_module(net, "it", drop_activations=True).notes == ["activation scales of 1 modules left out"]


def test_what_the_weights_need_is_never_dropped(net):
    net.blocks[0].second = rounded(net.blocks[0].second, divisor=mx.ones(64), rotation=16)
    net.blocks[0].second.set_activations(TABLE, Clock())
    with pytest.raises(
        ExportError,
        match=r"second has a division of its input's channels and a rotation of its input in blocks of 16, wh",
    ):
        plain_module(net, "it", drop_activations=True)


def test_layers_of_our_own_that_no_tool_has_are_refused(net):
    convolution = nn.Conv2d(3, 8, 3)
    net.stem = QuantizedConvolution.from_convolution(convolution, WeightFormat(8))
    with pytest.raises(
        ExportError,
        match=r"stem has a QuantizedConv2d, a layer of mlxquant's own, which it has no place for; quantize without it",
    ):
        plain_module(net, "it")


def test_dtypes(net):
    plain = plain_module(net, "it")
    half = plain.as_dtype("float16")
    assert {v.dtype for v in half.arrays.values()} == {mx.float16, mx.uint32}
    np.testing.assert_array_equal(
        np.array(half.arrays["blocks.0.first.scales"]), np.array(plain.arrays["blocks.0.first.scales"])
    )
    assert half.notes[0].startswith("floating tensors as float16: -0.0")
    coarse = plain.as_dtype("bfloat16")
    names = [f"blocks.{index}.first.scales" for index in range(2)]
    exact, rough = (
        np.concatenate([np.array(p.arrays[name].astype(mx.float32)) for name in names]) for p in (plain, coarse)
    )
    assert f"up to {(np.abs(rough - exact) / exact).max():.1e} of" in coarse.notes[1]
    net.norm_scale = mx.array([1e5])
    with pytest.raises(ExportError, match="norm_scale: holds values that float16 cannot"):
        plain_module(net, "it").as_dtype("float16")


def test_scales_of_small_rows_are_float32_and_no_float16(net):
    small = np.array(net.head.weight) * np.where(np.arange(40) == 3, 1e-6, 1)[:, None]
    net.head.weight = mx.array(small, mx.float32)
    net.head = rounded(net.head, "w8")
    plain = plain_module(net, "it")
    assert plain.arrays["head.scales"].dtype == plain.arrays["head.biases"].dtype == mx.float32
    assert plain.arrays["blocks.0.first.scales"].dtype == mx.float16
    assert plain.notes[0].startswith("scales of 1 layers as float32")
    coarse = plain.as_dtype("bfloat16").arrays["head.scales"].astype(mx.float32)
    np.testing.assert_allclose(np.array(coarse), np.array(plain.arrays["head.scales"]), rtol=2.0**-8)
    with pytest.raises(ExportError, match=r"head.scales: holds scales of .*e-10, .* use bfloat16 or float32"):
        plain.as_dtype("float16")
    assert plain.mixed_dtypes() == ""
    net.blocks = []
    net.half = mx.ones(3, mx.bfloat16)
    assert plain_module(net, "it").mixed_dtypes().startswith("MLX promotes float32 scales times bfloat16 inputs")


@pytest.mark.parametrize(("limit", "files"), [(10**6, [0, 0, 0, 0]), (800, [0, 0, 1, 2]), (1, [0, 1, 2, 3])])
def test_files_are_split_at_a_limit(tmp_path, limit, files):
    arrays = {"d": mx.ones(100), "b": mx.ones(100), "c": mx.ones(110), "a": mx.ones(120)}
    where = write_shards(tmp_path, arrays, {"format": "mlx"}, "{index}-of-{count}.safetensors", limit)
    names = [f"{index}-of-{max(files) + 1}.safetensors" for index in files]
    assert where == dict(zip(arrays, names, strict=True))
    assert list(where) == sorted(arrays)
    for name, file in where.items():
        found, metadata = mx.load(str(tmp_path / file), return_metadata=True)
        np.testing.assert_array_equal(np.array(found[name]), np.array(arrays[name]))
        assert metadata == {"format": "mlx"}


@pytest.mark.parametrize("text", ["w4-g32", "w8", "w3-g64", "w4-asym"])
def test_bfloat16_loses_nothing_of_formats_that_are_for_it(net, text):
    """And it is said which dtype a bfloat16 model has to be written in for that."""
    net.bias = mx.zeros((1,), mx.bfloat16)
    for format, dtype in ((f"{text}-bf16", "bfloat16"), (text, "float16")):
        net.head = rounded(nn.Linear(64, 40), format)
        for block in net.blocks:
            block.first = rounded(nn.Linear(64, 64), format)
        plain = plain_module(net, "it")
        assert plain.mixed_dtypes().endswith(f"but slower; --dtype {dtype} avoids that")
        written = plain.as_dtype("bfloat16")
        assert (plain.scale_change(mx.bfloat16) == 0) == (dtype == "bfloat16")
        assert any("no longer the calibrated ones" in note for note in written.notes) == (dtype == "float16")
        assert written.mixed_dtypes() == ""
        same = [
            mx.array_equal(value.astype(mx.float32), written.arrays[name].astype(mx.float32)).item()
            for name, value in plain.arrays.items()
            if name.endswith((".scales", ".biases"))
        ]
        assert all(same) == (dtype == "bfloat16")


def test_small_scales_for_bfloat16_are_float32_here_and_exact_there(net):
    net.head.weight = net.head.weight * 1e-7
    net.head = rounded(net.head, "w8-bf16")
    net.blocks, net.norm = [], mx.zeros((1,), mx.bfloat16)
    plain = plain_module(net, "it")
    assert plain.arrays["head.scales"].dtype == mx.float32
    assert plain.mixed_dtypes().startswith("MLX promotes float32 scales times bfloat16 inputs")
    assert plain.mixed_dtypes().endswith("; --dtype bfloat16 avoids that")
    assert plain.scale_change(mx.bfloat16) == 0
    net.head = rounded(nn.Linear(64, 40), "w8")
    net.head.scales = net.head.scales.astype(mx.float32) * 1e-7
    assert plain_module(net, "it").mixed_dtypes().endswith("exact, but slower")
