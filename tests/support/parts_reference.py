"""The same components in diffusers and transformers, and how far ours are from them: name of a case to what computes
both. ``benchmarks/native_parity.py`` prints the table.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import numpy as np

from mlxquant.models.checkpoints.folder import DiffusersFolder
from mlxquant.models.parts.autoencoder_files import load_autoencoder
from mlxquant.models.parts.clip import load_clip
from mlxquant.models.parts.t5 import encode_t5
from mlxquant.models.parts.timesteps import time_features
from mlxquant.models.parts.tokenizers import clip_tokenizer, t5_tokenizer

from support import parts
from support.odd_texts import has_stacked_marks, odd_texts


def tensor(values):
    import torch

    return torch.tensor(np.array(values))


def pictures_first(values):
    """[B,H,W,C] as torch has it."""
    return tensor(np.ascontiguousarray(np.array(values).transpose(0, 3, 1, 2)))


def channels_last(values):
    return values.detach().numpy().transpose(0, 2, 3, 1)


@contextmanager
def no_gradients():
    import torch

    with torch.no_grad():
        yield


def clip_pair(folder, config, ids, **write):
    """Ours and transformers' outputs of a CLIP, by name."""
    import transformers

    parts.write_clip(folder, "text_encoder", config, **write)
    ours = load_clip(DiffusersFolder(str(folder)), "text_encoder", mx.float32)(ids)
    theirs = getattr(transformers, config["architectures"][0]).from_pretrained(folder / "text_encoder")
    with no_gradients():
        said = theirs.eval()(tensor(ids).long(), output_hidden_states=True)
    pooled = said.text_embeds if hasattr(said, "text_embeds") else said.pooler_output
    return {
        "last": (ours.last, said.last_hidden_state.numpy()),
        "penultimate": (ours.penultimate, said.hidden_states[-2].numpy()),
        "pooled": (ours.pooled, pooled.numpy()),
    }


def t5_pair(folder, config, length, masked, batch=3):
    import transformers

    parts.write_t5(folder, "text_encoder", config)
    rng = np.random.default_rng(1)
    ids = mx.array(rng.integers(0, config["vocab_size"], (batch, length)).astype(np.int32))
    ends = rng.integers(1, length + 1, batch)
    mask = mx.array((np.arange(length)[None] < ends[:, None]).astype(np.int32)) if masked else None
    ours = encode_t5(DiffusersFolder(str(folder)), "text_encoder", ids, mask, mx.float32)
    theirs = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    with no_gradients():
        said = theirs(tensor(ids).long(), attention_mask=tensor(mask) if masked else None).last_hidden_state
    return {"last": (ours, said.numpy())}


def vae_pair(folder, config, height, width, tile=None):
    """Decoded and encoded; ``tile`` in places of the latent."""
    import diffusers

    parts.write_vae(folder, "vae", config)
    ours = load_autoencoder(DiffusersFolder(str(folder)), "vae", mx.float32)
    theirs = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    if tile is not None:
        theirs.enable_tiling()
        theirs.tile_latent_min_size, theirs.tile_sample_min_size = tile, tile * ours.factor
    channels = config["latent_channels"]
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor or 0.0
    rng = np.random.default_rng(1)
    latent = mx.array(rng.standard_normal((2, height, width, channels)).astype(np.float32))
    pictures = mx.array(rng.uniform(-1, 1, (2, height * 8, width * 8, 3)).astype(np.float32))
    with no_gradients():
        drawn = theirs.decode(pictures_first(latent) / scale + shift).sample
        mean = (theirs.encode(pictures_first(pictures)).latent_dist.mode() - shift) * scale
    return {
        "decoded": (ours.decode(latent, tile), channels_last(drawn)),
        "encoded": (ours.encode(pictures, tile), channels_last(mean)),
    }


def time_pair(folder, width, most, **options):
    from diffusers.models.embeddings import get_timestep_embedding

    t = np.array([0.0, 0.001, 0.2503, 0.5, 0.999, 1.0], np.float32) * most
    named = {"flip_sin_to_cos": True, "downscale_freq_shift": 0} | options
    return {
        "features": (
            time_features(mx.array(t), width, **options),
            get_timestep_embedding(tensor(t), width, **named).numpy(),
        )
    }


def clip_ids(folder, pad):
    """Token ids of many texts, ours and transformers'."""
    import transformers

    parts.write_clip_tokenizer(folder, "tokenizer", pad)
    ours = clip_tokenizer(DiffusersFolder(str(folder)), "tokenizer")(odd_texts())
    theirs = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    said = theirs(odd_texts(), padding="max_length", max_length=77, truncation=True)
    return {"ids": (ours, np.array(said["input_ids"]))}


def t5_ids(folder, fast):
    """Of a tokenizer.json, or of a spiece.model, and its mask."""
    import transformers

    parts.write_t5_tokenizer(folder, "tokenizer")
    theirs = transformers.T5Tokenizer.from_pretrained(folder / "tokenizer")
    if fast:
        (folder / "tokenizer" / "spiece.model").unlink()
        theirs.save_pretrained(folder / "tokenizer")
    texts = odd_texts() if fast else [text for text in odd_texts() if not has_stacked_marks(text)]
    ids, mask = t5_tokenizer(DiffusersFolder(str(folder)), "tokenizer")(texts, 120)
    said = theirs(texts, padding="max_length", max_length=120, truncation=True)
    return {"ids": (ids, np.array(said["input_ids"])), "mask": (mask, np.array(said["attention_mask"]))}


IDS = parts.random_ids(3, 77)
CASES = {
    "CLIP-L (SD1.5)": partial(clip_pair, config=parts.CLIP_L, ids=IDS),
    "CLIP-L, projected (SD3)": partial(clip_pair, config=parts.CLIP_L_PROJECTED, ids=IDS),
    "CLIP-G": partial(clip_pair, config=parts.CLIP_G, ids=IDS),
    "CLIP-G, 20 tokens": partial(clip_pair, config=parts.CLIP_G, ids=parts.random_ids(2, 20)),
    **{f"T5, {n} tokens": partial(t5_pair, config=parts.T5, length=n, masked=False) for n in (1, 77, 256, 512)},
    **{f"T5, {n} tokens, mask": partial(t5_pair, config=parts.T5, length=n, masked=True) for n in (77, 120, 300, 512)},
    "VAE, 4 channels": partial(vae_pair, config=parts.VAE, height=8, width=12),
    "VAE, 16 channels, no quant convs": partial(vae_pair, config=parts.VAE_16, height=8, width=12),
    "VAE, no attention": partial(vae_pair, config={**parts.VAE, "mid_block_add_attention": False}, height=4, width=4),
    "VAE, one quant conv": partial(vae_pair, config={**parts.VAE_16, "use_post_quant_conv": True}, height=4, width=4),
    "VAE, in tiles of 8": partial(vae_pair, config=parts.VAE, height=20, width=25, tile=8),
    "VAE, in tiles of 12": partial(vae_pair, config=parts.VAE_16, height=12, width=16, tile=12),
    "time up to 1, 256": partial(time_pair, width=256, most=1),
    "time up to 1000, 256": partial(time_pair, width=256, most=1000),
    "time, sines first": partial(time_pair, width=33, most=10, flip_sin_to_cos=False, downscale_freq_shift=1, scale=2),
}


CASES |= {
    "tokens, CLIP-L": partial(clip_ids, pad=parts.END),
    "tokens, CLIP-G": partial(clip_ids, pad="!"),
    "tokens, T5, spiece.model": partial(t5_ids, fast=False),
    "tokens, T5, tokenizer.json": partial(t5_ids, fast=True),
}
LIMITS = {"time up to 1000, 256": 4e-5}  # one bit of an angle of 1000 is 6e-5: torch's frequencies are off by such


def differences(folder, case):
    """The largest absolute difference of each output of a case."""
    return largest(CASES[case](folder))


def largest(pairs):
    """The largest absolute difference of each pair of arrays, ours and theirs, by name."""
    assert all(ours.shape == theirs.shape for ours, theirs in pairs.values())
    return {name: float(np.abs(np.array(ours) - theirs).max()) for name, (ours, theirs) in pairs.items()}
