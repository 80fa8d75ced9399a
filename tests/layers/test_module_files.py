"""Quantized modules in files: what comes back is what was written, or one error and nothing changed."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxquant as mq
from mlxquant.contents.reader import read_contents
from mlxquant.errors import ArtifactError
from mlxquant.files.checked import read_tensors, write_tensors
from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.layers.attention import QuantizedAttention, SoftmaxAttention
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.module_files import load_module, save_module
from mlxquant.layers.weight_only import W8A16Linear


class Vision(nn.Module):
    def __init__(self, width=32, stride=2, layers=2):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, stride=stride), nn.BatchNorm(width)
        self.layers = [nn.Linear(width, width) for _ in range(layers)]
        self.classes = nn.Embedding(7, width)

    def __call__(self, x):
        x = self.norm(self.conv(x))
        for layer in self.layers:
            x = nn.relu(layer(x))
        return self.classes.as_linear(x)


def vision(seed=0, dtype=mx.float32, **options):
    mx.random.seed(seed)
    model = Vision(**options)
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def arrays(model):
    return dict(tree_flatten(model.parameters()))


PICTURE = mx.array(np.random.default_rng(0).normal(size=(1, 9, 9, 3)).astype(np.float32))


@pytest.mark.parametrize("size", [1, 1e-6])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("format", ["w8a16", "w4a16-g32", "w3", "w8-tensor"])
def test_what_was_saved_is_loaded(tmp_path, format, dtype, size):
    model = vision(dtype=dtype)
    for layer in (model.conv, model.layers[0], model.classes):
        layer.weight = layer.weight * size
    mq.quantize_linears(model, format, embeddings=True, fallback="w8a16")
    path = save_module(model, tmp_path / "model.safetensors")
    fresh = vision(seed=1)
    assert load_module(fresh, path) is fresh
    expected = arrays(model)
    for layer in (model.conv, model.layers[0], model.classes):
        assert layer.scales.dtype == (mx.float16 if size == 1 else mx.float32)
    assert set(arrays(fresh)) == set(expected)
    for name, value in arrays(fresh).items():
        assert value.dtype == expected[name].dtype, name
        assert mx.array_equal(value, expected[name]).item(), name
    x = PICTURE.astype(dtype)
    assert mx.array_equal(fresh(x), model(x)).item()
    assert [type(m) for _, m in fresh.named_modules()] == [type(m) for _, m in model.named_modules()]
    save_module(fresh, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_what_is_shared_is_written_once_and_shared_again(tmp_path):
    model = vision()
    model.layers[1] = model.layers[0]
    model._probe = model.layers[0]  # hidden from MLX's parameters
    model.other = nn.Linear(32, 32)
    model.other.weight = model.layers[0].weight
    mq.quantize_linears(model)
    path = save_module(model, tmp_path / "model.safetensors")
    assert sum(value.nbytes for value in read_tensors(path, "quantized-module")[0].values()) == sum(
        {id(v): v.nbytes for v in arrays(model).values()}.values()
    )
    fresh = vision(seed=1)
    fresh.other, fresh._probe = nn.Linear(32, 32), nn.Linear(32, 32)
    load_module(fresh, path)
    assert type(fresh.other) is W8A16Linear
    assert fresh.layers[1] is fresh.layers[0]
    assert fresh._probe is fresh.layers[0]
    assert fresh.other.weight is fresh.layers[0].weight
    assert mx.array_equal(fresh(PICTURE), model(PICTURE)).item()


def test_a_file_can_be_inspected(tmp_path):
    model = vision()
    model.other = nn.Linear(32, 32)
    model.other.weight = model.layers[0].weight
    mq.quantize_linears(model, embeddings=True)
    contents = read_contents(save_module(model, tmp_path / "model.safetensors"))
    assert contents.kind == "quantized-module"
    assert {layer.path: str(layer.format) for layer in contents.layers} == dict.fromkeys(
        ("conv", "layers.0", "layers.1", "classes"), "w8"
    )


def other_class(model):
    model.layers[0] = nn.LayerNorm(32)


def wider(model):
    model.layers[1] = nn.Linear(32, 33)


def already_quantized(model):
    mq.quantize_linears(model)


def one_more(model):
    model.extra = nn.LayerNorm(4)


def no_norm(model):
    model.norm = nn.Identity()


def wider_norm(model):
    model.norm = nn.BatchNorm(31)


def no_bias(model):
    model.layers[0] = nn.Linear(32, 32, bias=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_class, r"at layers\.0 it has a W8A16Linear for a Linear of shape \(32, 32\), the model has a LayerNorm"),
        (wider, r"at layers\.1 .* the model's has shape \(33, 32\)"),
        (already_quantized, "the model has a .*; build the model anew, in full precision"),
        (no_bias, r"at layers\.0 .* just one of the two has a bias"),
        (one_more, r"lacks extra\.bias, extra\.weight \(2 in all\)"),
        (no_norm, r"the model, which lacks norm\.bias"),
        (wider_norm, r"norm\.bias has shape \(32,\), the model expects \(31,\)"),
    ],
)
def test_another_model_is_refused_and_unchanged(tmp_path, change, message):
    model = vision()
    mq.quantize_linears(model)
    path = save_module(model, tmp_path / "model.safetensors")
    fresh = vision(seed=1)
    change(fresh)
    before, modules = arrays(fresh), [type(m) for _, m in fresh.named_modules()]
    with pytest.raises(ArtifactError, match=message):
        load_module(fresh, path)
    assert all(value is before[name] for name, value in arrays(fresh).items())
    assert [type(m) for _, m in fresh.named_modules()] == modules


def test_other_depths_and_strides_are_refused(tmp_path):
    model = vision()
    mq.quantize_linears(model)
    path = save_module(model, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"at layers\.1 .*, the model has none"):
        load_module(vision(layers=1), path)
    with pytest.raises(ArtifactError, match=r"lacks layers\.2\.bias, layers\.2\.weight"):
        load_module(vision(layers=3), path)
    with pytest.raises(ArtifactError, match=r"'stride': .*; build the model that was quantized"):
        load_module(vision(stride=1), path)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    model = vision()
    mq.quantize_linears(model)
    path = save_module(model, tmp_path / "model.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    fresh = vision(seed=1)
    before = arrays(fresh)
    for content in (bytes(data), bytes(data[:-40]), b"", b"no tensors at all"):
        (tmp_path / "damaged.safetensors").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"damaged\.safetensors"):
            load_module(fresh, tmp_path / "damaged.safetensors")
    write_tensors(tmp_path / "stage.safetensors", "stage", {"a": mx.zeros((1,))})
    with pytest.raises(ArtifactError, match="expected a file of kind 'quantized-module', found 'stage'"):
        load_module(fresh, tmp_path / "stage.safetensors")
    with pytest.raises(ArtifactError, match="No such file"):
        load_module(fresh, tmp_path / "nothing.safetensors")
    assert all(value is before[name] for name, value in arrays(fresh).items())


def test_an_unknown_class_is_refused(tmp_path):
    header = {"layers": {"layers.0": {"class": "Later"}}, "layers_that_share": {}, "same_layers": {}, "same_arrays": {}}
    write_tensors(tmp_path / "later.safetensors", "quantized-module", {}, header)
    with pytest.raises(ArtifactError, match=r"layers\.layers\.0\.class is 'Later', expected one of 'QuantizedLinear'"):
        load_module(vision(), tmp_path / "later.safetensors")


def test_a_table_of_one_entry_comes_back_without_a_clock(tmp_path):
    model, fresh = vision(), vision()
    mq.quantize_linears(model)
    table = ActivationTable(np.array([0.0]), np.array([0.1]), np.zeros((1, 1)), np.array([8]))
    assert isinstance(model.layers[0], QuantizedLinear)
    model.layers[0].set_activations(table, Clock(0.0))
    load_module(fresh, save_module(model, tmp_path / "model.safetensors"))
    x = mx.random.normal((2, model.layers[0].width))
    assert fresh.layers[0].table.step == model.layers[0].table.step
    np.testing.assert_array_equal(np.array(fresh.layers[0](x)), np.array(model.layers[0](x)))


def test_quantized_attention_is_saved_for_a_model_with_an_attention_to_open(tmp_path):
    def with_attention(attention):
        model = vision()
        model.attention = attention
        return model

    table = ActivationTable(np.array([0.5]), np.array([0.1]), np.zeros((1, 1)), np.array([8]))
    file = mq.save_module(with_attention(QuantizedAttention(table, Clock(0.5))), tmp_path / "model.safetensors")
    q, k, v = (mx.random.normal((1, 2, 5, 4), key=mx.random.key(seed)) for seed in range(3))
    loaded = mq.load_module(with_attention(SoftmaxAttention()), file)
    wrote = QuantizedAttention(table, Clock(0.5))(q, k, v)
    np.testing.assert_array_equal(np.array(loaded.attention(q, k, v)), np.array(wrote))
    with pytest.raises(ArtifactError, match="its attention at attention is quantized, and the model has none there"):
        mq.load_module(vision(), file)
