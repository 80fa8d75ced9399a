"""A component of mflux: its folder, its files, and what its loader infers from them."""

import json
from importlib import import_module

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlxquant.errors import ExportError
from mlxquant.grids.packing import unpack
from mlxquant.layers.linear import find_quantized
from mlxquant.layers.tree import get_module, parameters


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(dim, dim),
            nn.Linear(dim, dim),
            nn.Linear(dim, dim),
            [nn.Linear(dim, dim)],
        )


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.attn, self.ff = Attention(dim), [nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)]


class Transformer(nn.Module):
    """With the parts that FLUX.1's has in mflux."""

    def __init__(self, dim=64):
        super().__init__()
        self.x_embedder, self.context_embedder = nn.Linear(32, dim), nn.Linear(96, dim)
        self.time_text_embed = [nn.Linear(32, dim)]
        self.transformer_blocks = [Block(dim) for _ in range(2)]
        self.single_transformer_blocks = [Block(dim)]
        self.norm_out, self.proj_out = nn.LayerNorm(dim), nn.Linear(dim, 32)


def inferred(arrays, path, module):
    """Bits and group size from shapes, by the rule of mflux's loader: the packed width over that of the unquantized
    weight, and that over the number of scales in a row.
    """
    width = module.weight.shape[-1]
    return int(arrays[f"{path}.weight"].shape[-1] * 32 / width), int(width / arrays[f"{path}.scales"].shape[-1])


@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_a_loader_that_looks_at_shapes_finds_our_codes(tmp_path, size):
    module = Transformer()
    to_q = module.transformer_blocks[0].attn.to_q
    to_q.weight = to_q.weight * size
    mq.quantize_linears(module, "w4a16-g32", include=["single_transformer_blocks.*"])
    mq.quantize_linears(module, "w8a16", include=["transformer_blocks.*.ff.*", "transformer_blocks.*.attn.*"])
    facts = mq.export(module, tmp_path / "out", "mflux")
    folder = tmp_path / "out" / "transformer"
    arrays, metadata = mx.load(str(folder / "0.safetensors"), return_metadata=True)
    assert metadata == {"quantization_level": "8", "mflux_version": "0.24.0"}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == metadata
    assert set(index["weight_map"]) == set(arrays)
    assert facts["layers"] == 6 + 12

    theirs = Transformer()
    nn.quantize(
        theirs, bits=8, class_predicate=lambda path, part: hasattr(part, "to_quantized") and f"{path}.scales" in arrays
        and dict(zip(("bits", "group_size"), inferred(arrays, path, part), strict=True)),
    )  # fmt: skip
    theirs.update(tree_unflatten(list(arrays.items())))
    assert parameters(theirs).keys() == arrays.keys()
    x = mx.random.normal((3, 64), key=mx.random.key(1))
    for path in find_quantized(module):
        ours, other = get_module(module, path), get_module(theirs, path)
        inputs = mx.tile(x, (1, ours.shape[1] // 64))
        np.testing.assert_allclose(np.array(ours(inputs)), np.array(other(inputs)), atol=2e-6)
        assert (other.scales.dtype == mx.float32) == (size != 1 and path == "transformer_blocks.0.attn.to_q")


def test_mflux_itself_loads_it(tmp_path):
    """Where it is installed, which is not where its torch and its MLX for CUDA would get in our way: by its own code,
    on its own model.
    """
    loader = pytest.importorskip("mflux.models.common.weights.loading.weight_loader").WeightLoader
    applier = pytest.importorskip("mflux.models.common.weights.loading.weight_applier").WeightApplier
    kind = import_module("mflux.models.qwen.model.qwen_transformer.qwen_transformer").QwenTransformer
    definition = import_module("mflux.models.qwen.weights.qwen_weight_definition").QwenWeightDefinition
    sizes = {
        "in_channels": 64,
        "num_layers": 2,
        "attention_head_dim": 128,
        "num_attention_heads": 2,
        "joint_attention_dim": 96,
    }
    module = kind(**sizes)
    mq.quantize_linears(module, "w4a16-g64", include=["transformer_blocks.*.attn.*"])
    mq.quantize_linears(module, "w8a16", include=["transformer_blocks.*.img_mod_linear"])
    mq.quantize_linears(module, "w3a16-g32", include=["transformer_blocks.0.txt_ff.*"])
    mq.export(module, tmp_path / "out", "mflux")

    (component,) = (c for c in definition.get_components() if c.name == "transformer")
    weights = loader.load_single_local(component, tmp_path / "out")
    assert (weights.meta_data.quantization_level, weights.meta_data.mflux_version) == (4, "0.24.0")
    theirs = kind(**sizes)
    applier.apply_and_quantize_single(weights, theirs, component, None, definition.quantization_predicate)
    assert (theirs.transformer_blocks[1].img_mod_linear.bits, theirs.transformer_blocks[0].attn.to_q.bits) == (8, 4)
    layers = find_quantized(module)
    for path, layer in layers.items():
        other = get_module(theirs, path)
        assert isinstance(other, nn.QuantizedLinear)
        np.testing.assert_array_equal(unpack(np.array(other.weight), other.bits, layer.shape[1]), layer.codes())
        x = mx.random.normal((3, layer.shape[1]), key=mx.random.key(1))
        np.testing.assert_allclose(np.array(other(x)), np.array(layer(x)), atol=1e-5)
    plain = {name: value for name, value in parameters(module).items() if name.rpartition(".")[0] not in layers}
    found = parameters(theirs)
    assert all(mx.array_equal(found[name], value).item() for name, value in plain.items())


def test_a_bfloat16_model_of_mflux_has_the_very_weights_that_were_chosen(tmp_path):
    """No number of ours is rounded on the way, and nothing is promoted there."""
    loader = pytest.importorskip("mflux.models.common.weights.loading.weight_loader").WeightLoader
    applier = pytest.importorskip("mflux.models.common.weights.loading.weight_applier").WeightApplier
    kind = import_module("mflux.models.qwen.model.qwen_transformer.qwen_transformer").QwenTransformer
    definition = import_module("mflux.models.qwen.weights.qwen_weight_definition").QwenWeightDefinition
    sizes = {
        "in_channels": 64, "num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 2,
        "joint_attention_dim": 96,
    }  # fmt: skip
    module = kind(**sizes)
    module.set_dtype(mx.bfloat16)
    mq.quantize_linears(module, "w4a16-g64-bf16", include=["transformer_blocks.*.attn.*"])
    mq.quantize_linears(module, "w8a16-bf16", include=["transformer_blocks.*.img_mod_linear"])
    facts = mq.export(module, tmp_path / "out", "mflux", dtype="bfloat16")
    assert facts["notes"] == ["floating tensors as bfloat16: +0.000 MB"]

    (component,) = (c for c in definition.get_components() if c.name == "transformer")
    theirs = kind(**sizes)
    weights = loader.load_single_local(component, tmp_path / "out")
    applier.apply_and_quantize_single(weights, theirs, component, None, definition.quantization_predicate)
    for path, layer in find_quantized(module).items():
        other = get_module(theirs, path)
        assert other.scales.dtype == other.biases.dtype == mx.bfloat16
        scales, biases = (value.astype(mx.float32) for value in (other.scales, other.biases))
        weight = mx.dequantize(other.weight, scales, biases, group_size=other.group_size, bits=other.bits)
        assert mx.array_equal(weight, layer.dequantized()).item()
        assert other(mx.ones((1, layer.shape[1]), mx.bfloat16)).dtype == mx.bfloat16


def test_another_component_goes_to_its_own_folder(tmp_path):
    class Encoder(Transformer):
        pass

    Encoder.__module__ = "mflux.models.flux.model.flux_text_encoder.clip_encoder.clip_encoder"
    module = Encoder()
    module.extra = nn.Linear(32, 32)
    mq.export(module, tmp_path / "out", "mflux", component="text_encoder")
    assert (tmp_path / "out" / "text_encoder" / "0.safetensors").exists()
    metadata = mx.load(str(tmp_path / "out" / "text_encoder" / "0.safetensors"), return_metadata=True)[1]
    assert metadata["quantization_level"] == "None"


def test_what_mflux_does_not_know_is_refused(tiny, tmp_path):
    with pytest.raises(
        ExportError, match=r"a ShapesModel with the parts \['context_embedder'.* mflux has no SD3, write such a model"
    ):
        mq.export(tiny, tmp_path / "out", "mflux")
    assert list(tmp_path.iterdir()) == []
