"""``mmdit-shapes`` in DiffusionKit's own MMDiT class: one checkpoint, two implementations, the same output, quantized
or not.
"""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxquant as mq
from mlxquant.grids.time import Clock
from mlxquant.layers.fast_cpu import attention, gelu
from mlxquant.layers.linear import find_quantized
from mlxquant.layers.tree import set_module

pytestmark = pytest.mark.diffusionkit
CLOSE = 1e-4  # relative


def host_of(diffusionkit, adapter):
    """DiffusionKit's transformer with the parameters of ``adapter``, float32, its quantized layers included."""
    sizes = adapter.module.config
    config = diffusionkit.config.MMDiTConfig(
        num_heads=sizes.num_heads, depth_multimodal=sizes.depth_multimodal, hidden_size_override=sizes.hidden_size,
        mlp_ratio=sizes.mlp_ratio, vae_latent_dim=sizes.vae_latent_dim, patch_size=sizes.patch_size,
        max_latent_resolution=sizes.max_latent_resolution, pooled_text_embed_dim=sizes.pooled_text_embed_dim,
        token_level_text_embed_dim=sizes.token_level_text_embed_dim, frequency_embed_dim=sizes.frequency_embed_dim,
        use_qk_norm=sizes.use_qk_norm, dtype=mx.float32, low_memory_mode=False,
    )  # fmt: skip
    host = diffusionkit.mmdit.MMDiT(config)
    for path, layer in find_quantized(adapter.module).items():
        set_module(host, path, layer)
    weights = tree_flatten(adapter.module.parameters())
    host.load_weights([(name, value) for name, value in weights if not name.startswith("text_encoder.")])
    return host


def with_our_functions(host):
    """The host with our GELU and attention, as the adapter of SD3-Medium has it; they differ from its own by a few
    units in the last place.
    """
    for block in host.multimodal_transformer_blocks:
        block.sdpa = lambda q, k, v, scale: attention(q, k, v)
        for stream in (block.image_transformer_block, block.text_transformer_block):
            if "mlp" in stream:
                stream.mlp.act_fn = gelu
    return host


@pytest.fixture(scope="module")
def trajectory(embedded):
    """Noise levels and latents of one guided picture at all 28 steps, and its two texts."""
    caption = embedded.adapter.prompts("evaluation", 1)[0]
    steps = []
    embedded.adapter.generate([caption.text], [caption.seed], callback=steps.append)
    assert len(steps) == 28
    return steps, embedded.adapter.encode([caption.text, ""])


@pytest.fixture(scope="module")
def twins(embedded, tmp_path_factory):
    """Two equal adapters by a recipe, for the host empties some layers of the one that it gets."""
    calib, folder = mq.calibrate(embedded, prompts=1, steps=28), tmp_path_factory.mktemp("shapes")

    def quantized(recipe):
        if not (folder / recipe).exists():
            mq.quantize(embedded, calib, recipe).save(folder / recipe)
        return [mq.load(folder / recipe).adapter for _ in range(2)]

    return quantized


def differences(ours, host, clock, trajectory):
    """Relative difference of the velocities [28], both sides of the guidance in one batch; ``clock`` is that of the
    host's layers.
    """
    steps, text = trajectory
    timesteps = mx.array(np.array([1000 * np.float32(step.sigma) for step in steps]))
    host.cache_modulation_params(text["pooled"], timesteps)
    found = []
    for index, step in enumerate(steps):
        latent = mx.concatenate([step.latent, step.latent])
        with clock.at(step.sigma):
            there = np.array(host(latent, text["tokens"][:, :, None], mx.broadcast_to(timesteps[index], [2])))
        here = np.array(ours.velocity(latent, text, step.sigma))
        found.append(np.linalg.norm(there - here) / np.linalg.norm(here))
    assert len(found) == 28
    return np.array(found)


def test_full_precision(diffusionkit, embedded, trajectory):
    theirs = embedded.clone()
    assert differences(embedded.adapter, host_of(diffusionkit, theirs), theirs.clock, trajectory).max() <= CLOSE


def test_quantized_weights(diffusionkit, twins, trajectory):
    ours, theirs = twins("rtn-w4a16")
    assert differences(ours, host_of(diffusionkit, theirs), theirs.clock, trajectory).max() <= CLOSE


def test_quantized_weights_and_activations(diffusionkit, twins, trajectory):
    """A last digit can move an input over a boundary of its 8-bit grid, and then many after it, so both sides compute
    alike here.
    """
    ours, theirs = twins("gptq-w4a8")
    host = with_our_functions(host_of(diffusionkit, theirs))
    assert differences(ours, host, theirs.clock, trajectory).max() <= CLOSE


def test_the_clock_decides(diffusionkit, twins, trajectory):
    """The tables in the host are read at the running noise level: one that stands still gives another output."""
    ours, theirs = twins("gptq-w4a8")
    host = with_our_functions(host_of(diffusionkit, theirs))
    with theirs.clock.at(0.001):
        assert differences(ours, host, Clock(), trajectory).max() > 100 * CLOSE
