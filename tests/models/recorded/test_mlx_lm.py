"""Language models of mlx-lm, recorded: the codes of the hand-written adapter, experts, and what cannot be recorded."""

import importlib

import mlx.core as mx
import pytest

import mlxquant as mq
from mlxquant.errors import CalibrationError
from mlxquant.layers.kinds import find_layers
from models.recorded.test_chain import recorded

from support.language_models import LLAMA, randomised, tiny_mlx_lm, tokens
from support.same_layers import assert_same
from support.tiny_language import TEXT, llama_folder

pytestmark = pytest.mark.mlxlm
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 64, "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip


def with_experts(kind):
    """A mixture of experts of mlx-lm, of which a token asks two of four."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {**LLAMA, **WIDE, **EXPERTS, "model_type": kind}
    return randomised(module.Model(module.ModelArgs.from_dict(config)))


def windows():
    """Four of two texts, and a shorter one of one."""
    return [((mx.array(tokens(2, 16, seed)),), {}) for seed in range(4)] + [((mx.array(tokens(1, 9, 4)),), {})]


@pytest.mark.parametrize("recipe", ["gptq-w4a16-g64", "rtn-w4a16", "rtn-w4a8-token"])
def test_a_llama_gets_the_codes_of_the_hand_written_adapter(recipe, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    model = mq.load(llama_folder(tmp_path / "llama"))
    calib = mq.calibrate_text(model, samples=8, length=32, data=text)
    wanted = mq.quantize(model, calib, recipe).layers
    _, states = calib.batches(model.adapter)
    other = model.clone()
    seen = recorded(other.module, *(((states[index]["tokens"],), {}) for index in range(len(states))))
    report = mq.quantize_module(other.module, seen, recipe)
    assert report.blocks == ("model.layers.0", "model.layers.1")
    assert_same(wanted, find_layers(other.module))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_quantized_as_the_layers_that_they_are(kind, tmp_path):
    model = with_experts(kind)
    seen = recorded(model, *windows())
    exact = [seen[index].result for index in range(len(seen))]
    report = mq.quantize_module(model, seen, "gptq-w8a16-g64")  # so near that tokens ask the same experts
    assert report.blocks == ("model.layers.0", "model.layers.1")
    kinds = [layer.kind for layer in report.sizes.layers]
    assert kinds.count("SwitchLinear") == 6
    assert [layer.path for layer in report.sizes.kept] == ["model.embed_tokens"]
    for (args, _), wanted in zip(windows(), exact, strict=True):
        off = float(mx.square(model(*args) - wanted).mean() / mx.square(wanted).mean())
        assert 0 < off < 0.01
    file = mq.save_module(model, tmp_path / "model.safetensors")
    fresh = mq.load_module(with_experts(kind), file)
    for args, _ in windows():
        assert mx.array_equal(fresh(*args), model(*args))


def test_a_cache_of_keys_and_values_is_refused_by_name():
    cache = importlib.import_module("mlx_lm.models.cache")
    model = tiny_mlx_lm("llama", **WIDE)
    refused = pytest.raises(CalibrationError, match=r"call 0 of Model: its argument cache\[0\], a KVCache, is changed")
    with refused, mq.recording(model):
        model(mx.array(tokens(1, 4)), cache=cache.make_prompt_cache(model))


def test_a_generation_is_refused_by_name():
    """mlx-lm's own loop makes the cache itself, and calls the model from a stream of its own."""
    generate = importlib.import_module("mlx_lm.generate")
    model = tiny_mlx_lm("llama", **WIDE)
    with pytest.raises(CalibrationError, match="a KVCache, is changed by the call"), mq.recording(model):
        for _ in generate.generate_step(mx.array(tokens(1, 4)[0]), model, max_tokens=3):
            pass
