"""Models of mlx-lm, built small from a config: quantized in place, they generate; saved, they come back."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxquant as mq
from mlxquant.layers.linear import find_quantized

pytestmark = pytest.mark.mlxlm
pytest.importorskip("mlx_lm")

CONFIGS = {
    "llama": {
        "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "vocab_size": 64, "tie_word_embeddings": False,
    },
    "gpt2": {"n_ctx": 32, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 32, "layer_norm_epsilon": 1e-5,
    "vocab_size": 64},
    "gptj": {"n_embd": 64, "vocab_size": 64, "n_positions": 32, "n_head": 4, "rotary_dim": 8, "n_layer": 2},
    "qwen3_moe": {
        "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "rms_norm_eps": 1e-5, "vocab_size": 64, "head_dim": 16, "rope_theta": 1e4, "tie_word_embeddings": True,
        "max_position_embeddings": 64, "norm_topk_prob": True,
    },
}  # fmt: skip


def built(kind, dtype=mx.float32, seed=0):
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **CONFIGS[kind]}))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def generated(model, count=5):
    from mlx_lm.generate import generate_step

    return [int(token) for token, _ in generate_step(mx.array([3, 1, 4, 1, 5]), model, max_tokens=count)]


CASES = [(kind, dtype) for kind in CONFIGS for dtype in (mx.float32, mx.bfloat16)]
CASES.remove(("qwen3_moe", mx.bfloat16))  # MLX gathers experts on the CPU in float32 alone


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_models_stay_near_and_generate(kind, dtype):
    model = built(kind, dtype)
    tokens = mx.array([[3, 1, 4, 1, 5, 9]])
    exact = np.array(model(tokens).astype(mx.float32))
    report = mq.quantize_linears(model, "w8a16", embeddings=True)
    logits = model(tokens)
    assert logits.dtype == dtype
    limit = 0.1 if kind == "qwen3_moe" else 0.03  # a router of random weights may choose another expert
    assert 0 < np.linalg.norm(np.array(logits.astype(mx.float32)) - exact) < limit * np.linalg.norm(exact)
    assert report.after < report.before
    assert len(generated(model)) == 5


def test_the_output_layer_of_a_codegen_like_model_can_be_excluded():
    model = built("gptj", mx.bfloat16)
    mq.quantize_linears(model, "w8a16", exclude=["lm_head"])
    assert type(model.lm_head) is nn.Linear
    assert set(find_quantized(model)) == {
        f"model.h.{n}.{name}"
        for n in range(2)
        for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out")
    }
    assert len(generated(model)) == 5


def test_a_model_that_says_how_it_wants_to_be_quantized_is_asked():
    model = built("qwen3_moe")
    report = mq.quantize_linears(model, "w4a16-g32")
    formats = {layer.path: layer.format for layer in report.layers}
    assert formats["model.layers.0.mlp.gate"] == "w8-g32"  # its router
    assert formats["model.layers.0.self_attn.q_proj"] == "w4-g32"
    assert formats["model.layers.0.mlp.switch_mlp.up_proj"] == "w4-g32"  # its experts


def test_adapters_train_on_top_of_a_quantized_model():
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, tokens = built("llama"), mx.array([[3, 1, 4, 1, 5, 9]])
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    report = mq.quantize_linears(model, exclude=["lm_head"])
    assert {layer.path.rpartition(".")[2] for layer in report.layers} == {"linear"}
    before = {name for name, _ in tree_flatten(model.trainable_parameters())}
    _, gradients = nn.value_and_grad(model, lambda tokens: model(tokens).square().mean())(tokens)
    moved = {name for name, value in tree_flatten(gradients) if mx.abs(value).max().item() > 0}
    assert moved == {
        name for name in before if name.endswith("lora_b")
    }  # which start at zero, so that lora_a cannot move yet
    assert {name.rpartition(".")[2] for name in before} == {"lora_a", "lora_b"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_models_come_back_from_their_file(kind, tmp_path):
    model = built(kind)
    mq.quantize_linears(model, "w4a16-g32", embeddings=True)
    path = mq.save_module(model, tmp_path / "model.safetensors")
    tokens = mx.array([[3, 1, 4, 1, 5, 9]])
    assert mx.array_equal(mq.load_module(built(kind, seed=1), path)(tokens), model(tokens)).item()
