"""The transformer is SD3's: its size, its parameter names, its arithmetic."""

import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxquant.errors import AdapterError
from mlxquant.layers.fast_cpu import attention, gelu
from mlxquant.models.mmdit.config import SD3_MEDIUM, MMDiTConfig
from mlxquant.models.mmdit.network import MMDiT, patch_tokens

TINY = MMDiTConfig(
    num_heads=2, depth_multimodal=2, hidden_size=32, vae_latent_dim=4, max_latent_resolution=8,
    pooled_text_embed_dim=16, token_level_text_embed_dim=24, frequency_embed_dim=16,
)  # fmt: skip


def inputs(batch=2, side=8):
    keys = [mx.random.key(i) for i in range(3)]
    latent = mx.random.normal((batch, side, side, 4), key=keys[0])
    return latent, mx.random.normal((batch, 5, 24), key=keys[1]), mx.random.normal((batch, 16), key=keys[2])


def shapes(model):
    return {name: value.shape for name, value in tree_flatten(model.parameters())}


def test_sd3_medium_has_its_published_size():
    """Lazily built: no weight is materialised. 2.085 B parameters, the position table of 192 x 192 included; 340
    Linears.
    """
    model = MMDiT(SD3_MEDIUM)
    total = sum(int(np.prod(shape)) for shape in shapes(model).values())
    assert total == pytest.approx(2.085e9, rel=0.003)
    assert len([m for _, m in model.named_modules() if isinstance(m, nn.Linear)]) == 340


def test_parameter_names_are_diffusionkits():
    names = shapes(MMDiT(replace(TINY, use_qk_norm=True)))
    block, last = "multimodal_transformer_blocks.0", "multimodal_transformer_blocks.1"
    assert names["x_embedder.proj.weight"] == (32, 2, 2, 4)
    assert names["x_pos_embedder.pos_embed.weight"] == (64, 32)
    assert names["y_embedder.mlp.layers.0.weight"] == (32, 16)
    assert names["t_embedder.mlp.layers.2.bias"] == (32,)
    assert names["context_embedder.weight"] == (32, 24)
    assert names[f"{block}.image_transformer_block.attn.q_proj.bias"] == (32,)
    assert f"{block}.image_transformer_block.attn.k_proj.bias" not in names
    assert names[f"{block}.text_transformer_block.adaLN_modulation.layers.1.weight"] == (192, 32)
    assert names[f"{block}.text_transformer_block.qk_norm.q_norm.weight"] == (16,)
    assert names[f"{block}.image_transformer_block.mlp.fc1.weight"] == (128, 32)
    assert names[f"{last}.text_transformer_block.adaLN_modulation.layers.1.weight"] == (64, 32)
    assert not [n for n in names if n.startswith(f"{last}.text_transformer_block") and ("o_proj" in n or "mlp" in n)]
    assert names["final_layer.linear.weight"] == (16, 32)
    assert names["final_layer.adaLN_modulation.layers.1.weight"] == (64, 32)


def reference(model, latent, tokens, pooled, t):
    """The forward pass once more in float64 NumPy, written from the paper (arXiv 2403.03206, figure 2)."""
    p = {name: np.array(value, np.float64) for name, value in tree_flatten(model.parameters())}
    config, d = model.config, model.config.hidden_size

    def linear(x, name):
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def silu(x):
        return x / (1 + np.exp(-x))

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def erf(x):
        return np.vectorize(__import__("math").erf)(x)

    def mlp(x, name):
        return linear(silu(linear(x, f"{name}.mlp.layers.0")), f"{name}.mlp.layers.2")

    latent, tokens, pooled, t = (np.array(v, np.float64) for v in (latent, tokens, pooled, t))
    b, height, width, _ = latent.shape
    patches = (
        latent.reshape(b, height // 2, 2, width // 2, 2, -1)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(b, height // 2 * width // 2, -1)
    )
    image = patches @ p["x_embedder.proj.weight"].reshape(d, -1).T + p["x_embedder.proj.bias"]
    side, h, w = config.max_latent_resolution, height // 2, width // 2
    table = p["x_pos_embedder.pos_embed.weight"].reshape(side, side, d)
    y0, x0 = (side - h) // 2, (side - w) // 2
    image = image + table[y0 : y0 + h, x0 : x0 + w].reshape(1, h * w, d)
    half = config.frequency_embed_dim // 2
    angles = t[:, None] * np.exp(-np.log(config.max_period) * np.arange(half) / half)
    c = mlp(pooled, "y_embedder") + mlp(np.concatenate([np.cos(angles), np.sin(angles)], -1), "t_embedder")
    text = linear(tokens, "context_embedder")
    n = image.shape[1]
    for i in range(config.depth_multimodal):
        streams, mods, qkv = {"image": image, "text": text}, {}, {"q": [], "k": [], "v": []}
        for name, x in streams.items():
            prefix = f"multimodal_transformer_blocks.{i}.{name}_transformer_block"
            chunks = 2 if name == "text" and i == config.depth_multimodal - 1 else 6
            mods[name] = np.split(linear(silu(c), f"{prefix}.adaLN_modulation.layers.1")[:, None], chunks, -1)
            modulated = norm(x) * (1 + mods[name][1]) + mods[name][0]
            for kind in "qkv":
                heads = linear(modulated, f"{prefix}.attn.{kind}_proj").reshape(b, x.shape[1], config.num_heads, -1)
                if config.use_qk_norm and kind in "qk":
                    heads = (
                        heads
                        / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6)
                        * p[f"{prefix}.qk_norm.{kind}_norm.weight"]
                    )
                qkv[kind].append(heads.transpose(0, 2, 1, 3))
        q, k, v = (np.concatenate(qkv[kind], 2) for kind in "qkv")
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (weights / weights.sum(-1, keepdims=True)) @ v
        attended = attended.transpose(0, 2, 1, 3).reshape(b, -1, d)
        for name, part in (("image", attended[:, :n]), ("text", attended[:, n:])):
            if len(mods[name]) == 2:
                continue
            prefix, (_, _, gate1, shift2, scale2, gate2) = (
                f"multimodal_transformer_blocks.{i}.{name}_transformer_block",
                mods[name],
            )
            x = streams[name] + gate1 * linear(part, f"{prefix}.attn.o_proj")
            hidden = linear(norm(x) * (1 + scale2) + shift2, f"{prefix}.mlp.fc1")
            hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
            streams[name] = x + gate2 * linear(hidden, f"{prefix}.mlp.fc2")
        image, text = streams["image"], streams["text"]
    shift, scale = np.split(linear(silu(c), "final_layer.adaLN_modulation.layers.1")[:, None], 2, -1)
    out = linear(norm(image) * (1 + scale) + shift, "final_layer.linear").reshape(b, h, w, 2, 2, -1)
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, -1)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("side", [8, 12])
def test_forward_equals_an_independent_float64_implementation(qk_norm, side):
    model = MMDiT(replace(TINY, use_qk_norm=qk_norm))
    t = mx.array([900.0, 37.5])
    latent, tokens, pooled = inputs(side=side)
    ours = np.array(model(latent, tokens, pooled, t))
    expected = reference(model, latent, tokens, pooled, t)
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


def test_latents_that_exceed_the_position_table_are_refused():
    with pytest.raises(AdapterError, match="10x10 patches exceeds the 8x8 position table"):
        MMDiT(TINY)(*inputs(side=20), mx.array([1.0, 2.0]))


def test_unknown_or_impossible_configurations_are_refused():
    with pytest.raises(AdapterError, match=r"unknown keys \['depth'\]"):
        MMDiTConfig.from_dict({"depth": 3})
    with pytest.raises(AdapterError, match="not divisible"):
        MMDiTConfig(num_heads=7)
    assert MMDiTConfig.from_dict(TINY.to_dict()) == TINY


def test_patch_tokens_puts_each_patch_in_its_place():
    tokens = mx.arange(2 * 3 * 4, dtype=mx.float32).reshape(1, 6, 4)
    image = np.array(patch_tokens(tokens, 2, 4, 6))[0, :, :, 0]
    np.testing.assert_array_equal(image[:2, :2], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(image[2:, 4:], [[20, 21], [22, 23]])


def test_fast_gelu_and_its_gradient_are_exact():
    x = mx.linspace(-12, 12, 20001)
    np.testing.assert_allclose(np.array(gelu(x)), np.array(nn.gelu(x)), atol=1.5e-6)
    ours, theirs = (mx.grad(lambda v, f=f: f(v).sum())(x) for f in (gelu, nn.gelu))
    np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1.5e-6)
    assert gelu(x.astype(mx.float16)).dtype == mx.float16


def test_fast_functions_need_no_compiler():
    """MLX compiles with g++ at run time where there is one, and runs without where there is none."""
    script = (
        "import mlxquant, mlx.core as mx; from mlxquant.layers.fast_cpu import attention, gelu; x = mx.ones((1, 1, 2,"
        " 2)); "
    )
    script += "print(gelu(x) + attention(x, x, x))"
    done = subprocess.run([sys.executable, "-c", script], env={"PATH": ""}, capture_output=True, text=True, check=True)
    assert "1.84134" in done.stdout


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_fast_attention_and_its_gradient_are_exact(spread):
    q, k, v = (mx.random.normal((2, 3, 9, 8), key=mx.random.key(i)) * spread for i in range(3))

    def theirs(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5)

    np.testing.assert_allclose(np.array(attention(q, k, v)), np.array(theirs(q, k, v)), atol=2e-5 * spread)
    for argument in range(3):
        ours, exact = (mx.grad(lambda *a, f=f: mx.square(f(*a)).sum(), argument)(q, k, v) for f in (attention, theirs))
        np.testing.assert_allclose(np.array(ours), np.array(exact), atol=1e-4 * float(np.abs(np.array(exact)).max()))
    assert attention(*(x.astype(mx.float16) for x in (q, k, v))).dtype == mx.float16
