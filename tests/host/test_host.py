"""DiffusionKit alone, unpatched where that is possible: it reads our checkpoints and draws pictures on this machine."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

pytestmark = pytest.mark.diffusionkit
PROMPT = "a tabby cat on a table"


@pytest.fixture
def pipeline(diffusionkit, tiny_host):
    return diffusionkit.DiffusionPipeline(low_memory_mode=False, w16=True, shift=3.0)


def draw(pipeline, prompt=PROMPT, seed=7):
    image, _ = pipeline.generate_image(prompt, cfg_weight=5, num_steps=2, latent_size=(8, 8), seed=seed, verbose=False)
    return np.asarray(image)


def test_a_picture_from_the_hub_cache(pipeline):
    picture = draw(pipeline)
    assert picture.shape == (64, 64, 3)
    assert 20 < picture.std() < 110
    np.testing.assert_array_equal(draw(pipeline), picture)
    assert (draw(pipeline, seed=8) != picture).mean() > 0.5
    assert (draw(pipeline, "a large red circle") != picture).mean() > 0.2


def test_text_has_the_shapes_and_scale_of_the_real_encoders(pipeline, random_sd3):
    tokens, pooled = pipeline.encode_text(PROMPT, cfg_weight=5)
    assert (tokens.shape, pooled.shape) == ((2, 77 + 512, 4096), (2, random_sd3.TINY.pooled))
    assert tokens.dtype == mx.float32
    clip = random_sd3.TINY.pooled
    for part in (tokens[:, :77, :clip], tokens[:, 77:], pooled):
        assert 0.1 < part.astype(mx.float32).std().item() < 2
        assert mx.abs(part[0] - part[1]).max().item() > 0.1  # the prompt is told from the empty one
    assert not tokens[:, :77, clip:].any().item()


def test_hidden_states_stay_of_unit_scale(pipeline):
    tokens, pooled = pipeline.encode_text(PROMPT, cfg_weight=5)
    latent, _ = pipeline.denoise_latents(tokens, pooled, num_steps=4, cfg_weight=5, latent_size=(8, 8), seed=7)
    assert 0.3 < latent.std().item() < 3


def test_t5_in_pieces_is_t5(pipeline):
    """Without ``TransformerEncoder.__call__``, which asks for the memory size of a Metal device and has a one-shot
    mode.
    """
    ids = pipeline._tokenize(pipeline.t5_tokenizer, PROMPT)
    t5 = pipeline.t5_encoder
    x = t5.wte(ids)
    dtype, bias = x.dtype, t5.encoder.relative_attention_bias(ids.shape[1], ids.shape[1])
    for layer in t5.encoder.layers:
        x = layer(x, mask=bias)
    np.testing.assert_array_equal(np.array(t5.encoder.ln(x).astype(dtype)), np.array(t5(ids)))


def test_tokenizers_know_every_printable_character(pipeline):
    text = "".join(map(chr, range(33, 127)))
    unknown = pipeline.t5_tokenizer._tokenizer.unk_token_id
    assert unknown not in pipeline.t5_tokenizer.tokenize(text)
    ids = pipeline.tokenizer_l.tokenize(text)
    assert max(ids) == ids[-1] == pipeline.tokenizer_l.eos_token
    assert len(pipeline.t5_tokenizer.tokenize("a large red circle")) < len("a large red circle")


def test_environment_alone_leads_the_host_to_the_files(hub_cache):
    """In a process of its own, offline, with nothing patched."""
    code = """
from diffusionkit.mlx import model_io
from huggingface_hub import hf_hub_download
for name in ("sd3_medium.safetensors", "config.json"):
    hf_hub_download("argmaxinc/mlx-stable-diffusion-3-medium", name)
encoders = [model_io.load_text_encoder(model_key=key) for key in ("clip_l", "clip_g")]
encoders += [model_io.load_t5_encoder(low_memory_mode=False)]
tokenizer = model_io.load_tokenizer(vocab_key="tokenizer_l_vocab", merges_key="tokenizer_l_merges", pad_with_eos=True)
print(len(encoders), len(tokenizer.tokenize("a cat")), model_io.load_t5_tokenizer(512).tokenize("a cat")[-1])
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "3"
    assert done.stdout.split()[2] == "1"


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors}


def lazily(tensors):
    """A state dictionary of these shapes without their memory."""
    return {tensor.name: mx.zeros(tensor.shape, mx.float16) for tensor in tensors}


def test_names_and_shapes_at_the_real_size(diffusionkit, random_sd3):
    """The host's own, unpatched modules take every tensor of the real size, and no other. Nothing is evaluated."""
    model_io = diffusionkit.model_io
    sizes = random_sd3.SD3_MEDIUM
    transformer = diffusionkit.model_io.MMDiT(model_io.SD3_2b)
    whole = lazily([*random_sd3.mmdit(sizes), *random_sd3.vae(sizes)])
    found = model_io.mmdit_state_dict_adjustments(whole, prefix="model.diffusion_model.")
    assert shapes(found.items()) == shapes(tree_flatten(transformer.parameters()))
    for half, module in (("encoder", model_io.VAEEncoder()), ("decoder", model_io.VAEDecoder())):
        adjust = getattr(model_io, f"vae_{half}_state_dict_adjustments")
        found = adjust(whole, prefix=f"first_stage_model.{half}.")
        assert shapes(found.items()) == shapes(tree_flatten(module.parameters()))


def test_text_encoders_at_the_real_size(diffusionkit, random_sd3):
    model_io = diffusionkit.model_io
    for sizes in (random_sd3.SD3_MEDIUM.clip_l, random_sd3.SD3_MEDIUM.clip_g):
        config = model_io.CLIPTextModelConfig(
            sizes.layers, sizes.hidden, sizes.heads, 77, sizes.vocabulary, sizes.hidden, sizes.activation
        )
        found = [
            pair
            for key, value in lazily(random_sd3.clip(sizes)).items()
            for pair in model_io.map_clip_text_encoder_weights(key, value)
        ]
        assert shapes(found) == shapes(tree_flatten(model_io.CLIPTextModel(config).parameters()))
    sizes = random_sd3.SD3_MEDIUM.t5
    config = model_io.T5Config(
        vocab_size=sizes.vocabulary, d_model=4096, d_kv=sizes.head, d_ff=sizes.feed_forward, num_layers=sizes.layers,
        num_heads=sizes.heads, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    found = model_io.t5_encoder_state_dict_adjustments(lazily(random_sd3.t5(sizes)))
    assert shapes(found.items()) == shapes(tree_flatten(model_io.SD3T5Encoder(config).parameters()))
