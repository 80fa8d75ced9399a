"""What stock mlx-lm makes of an exported folder: strict loading, our logits, our codes, its own count of bits, text."""

import json
from importlib import import_module

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxquant.errors import ExportError
from mlxquant.exporters import mlx_lm as target
from mlxquant.grids.packing import unpack
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.embeddings import QuantizedEmbedding
from mlxquant.layers.linear import QuantizedLinear, find_quantized
from mlxquant.layers.tree import find_linears, get_module, set_module
from mlxquant.models.gpt.network import GPT, GPTConfig
from mlxquant.models.gpt.tokenizers import ByteTokenizer

pytestmark = pytest.mark.mlxlm
mlx_lm = pytest.importorskip("mlx_lm")

MIXED = [
    "w2-g32",
    "w3-g64",
    "w4",
    "w5-asym",
    "w6-g32-sym",
    "w7",
    "w8-tensor",
]  # the last layer of the GPT stays as it is
TOKENS = mx.array([[7, 1, 200, 3, 3, 90], [5, 4, 255, 0, 17, 9]])
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 256, "rope_theta": 10000.0,
}  # fmt: skip


def drawn(module):
    """The module with random parameters, the same every time, of a size at which each matters."""
    keys = iter(mx.random.split(mx.random.key(0), 200))
    module.update(tree_map(lambda x: mx.random.normal(x.shape, key=next(keys)) * 0.2, module.parameters()))
    return module


def quantized(module, formats):
    for (path, linear), format in zip(find_linears(module).items(), formats, strict=False):
        weight = np.array(linear.weight.astype(mx.float32))
        grid = fit_extremes(weight, WeightFormat.parse(format))
        set_module(module, path, QuantizedLinear(grid.quantize(weight), grid, linear.get("bias")))
    return module


def gpt():
    config = GPTConfig(vocab_size=256, n_positions=32, n_embd=64, n_head=2, n_layer=2)
    return drawn(GPT(config)), config.to_dict()


def llama(tied, dtype=mx.float32):
    config = {**LLAMA, "tie_word_embeddings": tied}
    kind, arguments = import_module("mlx_lm.utils")._get_classes(config)
    module = drawn(kind(arguments.from_dict(config)))
    module.set_dtype(dtype)
    return module, config


def loaded(folder):
    model, tokenizer = mlx_lm.load(str(folder))
    return model, tokenizer


def difference(one, other):
    """The largest, as a share of the largest of the first."""
    one, other = (np.array(v.astype(mx.float32)) for v in (one, other))
    return np.abs(one - other).max() / np.abs(one).max()


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_gpt_of_mixed_bits(tmp_path, embeddings):
    module, config = gpt()
    quantized(module, MIXED)
    if embeddings:
        module.model.wte = QuantizedEmbedding.from_embedding(module.model.wte, WeightFormat.parse("w6-g32"))
    facts = mq.export(module, tmp_path / "out", "mlx-lm", config=config, tokenizer=ByteTokenizer())
    theirs, tokenizer = loaded(tmp_path / "out")
    assert difference(module(TOKENS), theirs(TOKENS)) < 3e-6
    assert theirs(TOKENS).dtype == mx.float32

    for path, layer in find_quantized(module).items():
        other = get_module(theirs, path)
        assert isinstance(other, nn.QuantizedEmbedding if path.endswith("wte") else nn.QuantizedLinear)
        assert other.bits == (8 if layer.format.bits == 7 else layer.format.bits)
        np.testing.assert_array_equal(unpack(np.array(other.weight), other.bits, layer.shape[1]), layer.codes())
        np.testing.assert_array_equal(np.array(other.scales)[:, 0], np.array(layer.grid().scales)[:, 0])
    assert type(get_module(theirs, "model.h.1.mlp.c_proj")) is nn.Linear
    assert isinstance(theirs.model.wte, nn.QuantizedEmbedding) == embeddings
    assert facts["bits_per_weight"] == pytest.approx(
        import_module("mlx_lm.utils").compute_bits_per_weight(theirs), rel=1e-6
    )
    assert facts["layers"] == 7 + embeddings
    assert any("7-bit codes written with 8 bits in 1 layers" in note for note in facts["notes"])
    assert tokenizer.encode("def") == list(b"def")
    assert isinstance(mlx_lm.generate(theirs, tokenizer, "def ", max_tokens=4), str)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_rows_too_small_for_float16(tmp_path, dtype):
    """mlx-lm computes with the same numbers, and --dtype float16 is refused."""
    module, config = llama(tied=False, dtype=dtype)
    path = next(iter(find_linears(module)))
    linear = get_module(module, path)
    linear.weight = linear.weight * mx.where(mx.arange(linear.weight.shape[0]) % 2, 1e-7, 1)[:, None].astype(dtype)
    quantized(module, ["w8"])
    ours = get_module(module, path)
    facts = mq.export(module, tmp_path / "out", "mlx-lm", config=config, tokenizer=ByteTokenizer())
    assert any(note.startswith("scales of 1 layers as float32") for note in facts["notes"])
    theirs = get_module(loaded(tmp_path / "out")[0], path)
    assert theirs.scales.dtype == ours.scales.dtype == mx.float32
    x = mx.random.normal((3, ours.shape[1]), key=mx.random.key(1))
    one, other = np.array(ours(x)), np.array(theirs(x))
    np.testing.assert_allclose(one, other, atol=2e-6)
    np.testing.assert_allclose(one[:, 1::2], other[:, 1::2], atol=2e-13)
    assert np.abs(one[:, 1::2]).max() > 1e-8
    again = {"config": config, "tokenizer": ByteTokenizer()}
    mq.export(module, tmp_path / "coarse", "mlx-lm", dtype="bfloat16", **again)
    with pytest.raises(ExportError, match=f"{path}.scales: holds scales of .* where float16 has fewer digits"):
        mq.export(module, tmp_path / "none", "mlx-lm", dtype="float16", **again)


def test_the_config_says_what_every_layer_is(tmp_path):
    module, config = gpt()
    quantized(module, ["w4-g64"] * 5)
    mq.export(
        module, tmp_path / "out", "mlx-lm", config={**config, "mlxquant": {"sha256": "0"}}, tokenizer=ByteTokenizer()
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    found = written["quantization"]
    assert written["quantization_config"] == found
    assert {key: found.pop(key) for key in ("group_size", "bits", "mode")} == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }
    assert sum(value is False for value in found.values()) == 3 + 2  # Linears, and the two embeddings
    assert found["model.h.0.attn.c_attn"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert written["n_embd"] == 64
    assert "mlxquant" not in written


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 3e-6), (mx.float16, 6e-3), (mx.bfloat16, 2e-2)])
def test_a_llama(tmp_path, tied, dtype, tolerance):
    module, config = llama(tied, dtype)
    quantized(module, ["w4-g32", "w8"] * 8)
    facts = mq.export(module, tmp_path / "out", "mlx-lm", config=config, tokenizer=ByteTokenizer())
    theirs, _ = loaded(tmp_path / "out")
    assert difference(module(TOKENS), theirs(TOKENS)) < tolerance
    assert theirs(TOKENS).dtype == (mx.float32 if dtype == mx.bfloat16 else dtype)
    assert any("--dtype float16 avoids that" in note for note in facts["notes"]) == (dtype == mx.bfloat16)


def test_one_dtype_for_all(tmp_path):
    module, config = llama(False, mx.bfloat16)
    quantized(module, ["w4-g32"] * 14)
    facts = mq.export(module, tmp_path / "a", "mlx-lm", config=config, tokenizer=ByteTokenizer(), dtype="float16")
    assert not any("promotes" in note or "no longer" in note for note in facts["notes"])
    theirs, _ = loaded(tmp_path / "a")
    assert theirs(TOKENS).dtype == mx.float16
    facts = mq.export(module, tmp_path / "b", "mlx-lm", config=config, tokenizer=ByteTokenizer(), dtype="bfloat16")
    assert any("scales are no longer the calibrated ones: up to 3.9e-03" in note for note in facts["notes"])
    assert loaded(tmp_path / "b")[0](TOKENS).dtype == mx.bfloat16


def test_large_models_are_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(target, "FILE_LIMIT", 50_000)
    module, config = gpt()
    quantized(module, MIXED)
    facts = mq.export(module, tmp_path / "out", "mlx-lm", config=config, tokenizer=ByteTokenizer())
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    theirs, _ = loaded(tmp_path / "out")
    assert difference(module(TOKENS), theirs(TOKENS)) < 3e-6
    weights = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert index["metadata"]["total_size"] < weights < facts["bytes"]


def test_a_model_that_is_not_quantized(tmp_path):
    module, config = gpt()
    facts = mq.export(
        module, tmp_path / "out", "mlx-lm", config={**config, "quantization": {"bits": 4}}, tokenizer=ByteTokenizer()
    )
    assert facts["bits_per_weight"] == 32
    assert not {"quantization", "quantization_config"} & set(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert difference(module(TOKENS), loaded(tmp_path / "out")[0](TOKENS)) < 3e-6


def test_a_model_of_mlx_lms_own_quantization_keeps_it(tmp_path):
    module, config = llama(False)
    nn.quantize(
        module, group_size=32, bits=4, class_predicate=lambda path, part: path.endswith(("up_proj", "embed_tokens"))
    )
    nn.quantize(module, mode="mxfp4", group_size=32, class_predicate=lambda path, part: path.endswith("gate_proj"))
    quantized(module, ["w8-g32"] * 20)
    mq.export(module, tmp_path / "out", "mlx-lm", config=config, tokenizer=ByteTokenizer())
    theirs, _ = loaded(tmp_path / "out")
    assert difference(module(TOKENS), theirs(TOKENS)) < 3e-6
    assert get_module(theirs, "model.layers.1.mlp.gate_proj").mode == "mxfp4"


def test_a_tokenizer_of_transformers(tmp_path):
    module, config = gpt()
    mq.export(module, tmp_path / "a", "mlx-lm", config=config, tokenizer=ByteTokenizer())
    tokenizer = loaded(tmp_path / "a")[1]
    mq.export(module, tmp_path / "b", "mlx-lm", config=config, tokenizer=tokenizer)
    assert loaded(tmp_path / "b")[1].encode("a b") == list(b"a b")


def test_quantize_linears_then_export(tmp_path):
    """Any model of mlx-lm's in two lines."""
    module, config = llama(True)
    mq.quantize_linears(module, "w8a16", embeddings=True)
    facts = mq.export(module, tmp_path / "out", "mlx-lm", config=config, tokenizer=ByteTokenizer())
    assert any("scales of 1 layers as float32" in note for note in facts["notes"])
    assert difference(module(TOKENS), loaded(tmp_path / "out")[0](TOKENS)) < 3e-6


def test_equal_models_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        module, config = gpt()
        mq.export(quantized(module, MIXED), tmp_path / name, "mlx-lm", config=config, tokenizer=ByteTokenizer())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_what_a_language_model_was_trained_with_is_refused_or_dropped(tmp_path):
    """Activations quantized token by token: the weights alone are what stock mlx-lm can run."""
    module, config = gpt()
    for layer in find_quantized(quantized(module, ["w4-g64"] * 8)).values():
        layer.quantize_tokens(8)
    arguments = {"config": config, "tokenizer": ByteTokenizer()}
    with pytest.raises(
        ExportError,
        match=r"c_attn has activations quantized a token \(as have 7 more layers\), which mlx-lm has no place for",
    ):
        mq.export(module, tmp_path / "out", "mlx-lm", **arguments)
    facts = mq.export(module, tmp_path / "out", "mlx-lm", drop_activations=True, **arguments)
    assert facts["notes"] == ["activation scales of 8 modules left out"]
    theirs, _ = loaded(tmp_path / "out")
    assert difference(module(TOKENS), theirs(TOKENS)) > 1e-4
    for layer in find_quantized(module).values():
        layer.drop_activations()
    assert difference(module(TOKENS), theirs(TOKENS)) < 3e-6


def test_a_model_without_a_type_is_refused(tmp_path):
    module, _ = gpt()
    with pytest.raises(ExportError, match="no model_type"):
        mq.export(module, tmp_path / "out", "mlx-lm", config={"n_embd": 64}, tokenizer=ByteTokenizer())
    assert not (tmp_path / "out").exists()
