"""PixArt in diffusers, from the same weights, and how far ours is from it: name of a case to what computes both. Of
pipelines it is relative to the largest value, for a model that was not trained lets latents grow.
"""

import mlxquant as mq  # before mlx

# isort: split
from functools import partial
from importlib import import_module

import mlx.core as mx
import numpy as np

from mlxquant.layers.tree import parameters
from mlxquant.models.pixart.adapter import PixArtAlpha, PixArtSigma
from mlxquant.sampling.sampler import seeded_noise

from support.pixart import CONFIGS, small_config, small_network, write_pixart

TOKENS, TIMES = 7, [991.0, 13.0]
LENGTHS = {"all": (7, 7), "several": (7, 3), "one": (1, 1)}  # of the two texts
SIDES = ((8, 8), (8, 16), (24, 4))
HOSTS = {"512": PixArtAlpha, "1024": PixArtAlpha, "sigma": PixArtSigma, "no variance": PixArtAlpha}
PROMPTS, SEEDS, STEPS, SIZE = ["  A photo of a CAT", "the quick brown fox, at 4 o'clock"], [3, 8], 10, (96, 64)


def tensor(values):
    return import_module("torch").tensor(np.ascontiguousarray(values))


def their_network(config, ours):
    """Diffusers' model with the same weights; it takes every tensor, and lacks none."""
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    model = import_module("diffusers").PixArtTransformer2DModel(**options).eval()
    values = {name: np.array(value) for name, value in parameters(ours).items()}
    values["pos_embed.proj.weight"] = values["pos_embed.proj.weight"].transpose(0, 3, 1, 2)
    model.load_state_dict({name: tensor(value) for name, value in values.items()}, strict=True)
    return model


def network_pair(folder, name, sides, lengths):
    """What both predict of two rows at different times, with texts of these lengths."""
    config = small_config(name)
    ours, random = small_network(config), np.random.default_rng(3)
    latent = random.standard_normal((2, *sides, config["in_channels"])).astype(np.float32)
    tokens = random.standard_normal((2, TOKENS, config["caption_channels"])).astype(np.float32)
    mask, t = np.arange(TOKENS) < np.array(lengths)[:, None], np.array(TIMES, np.float32)
    height, width = (8 * side for side in sides)
    told = {"resolution": None, "aspect_ratio": None}
    if ours.config.use_additional_conditions:
        told = {"resolution": [[height, width]] * 2, "aspect_ratio": [[height / width]] * 2}
        told = {key: tensor(np.array(value, np.float32)) for key, value in told.items()}
    with import_module("torch").no_grad():
        (wanted,) = their_network(config, ours)(
            tensor(latent.transpose(0, 3, 1, 2)),
            encoder_hidden_states=tensor(tokens),
            encoder_attention_mask=tensor(mask.astype(np.int64)),
            timestep=tensor(t),
            added_cond_kwargs=told,
            return_dict=False,
        )
    found = ours(*map(mx.array, (latent, tokens, mask, t)), height, width)
    return {"prediction": (np.array(found), wanted.numpy().transpose(0, 2, 3, 1))}


def their_steps(folder, kind, noise, negative):
    """Latents before each step and after the last, and pictures."""
    pipe = getattr(import_module("diffusers"), kind.pipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    latents = [noise]
    pictures = pipe(
        PROMPTS,
        negative_prompt=negative,
        num_inference_steps=STEPS,
        guidance_scale=kind.cfg,
        width=SIZE[0],
        height=SIZE[1],
        latents=tensor(noise.transpose(0, 3, 1, 2)),
        output_type="np",
        clean_caption=False,
        use_resolution_binning=False,
        callback=lambda step, t, latent: latents.append(latent.numpy().transpose(0, 2, 3, 1)),
    ).images
    return np.stack(latents), pictures


def pipeline_pair(folder, name, negative=""):
    """Every latent of a guided trajectory, over the largest at its step, and the pictures at its end."""
    kind = HOSTS[name]
    write_pixart(folder, name, kind)
    adapter = mq.load(folder).adapter
    adapter.resize(SIZE)
    noise = np.array(seeded_noise(SEEDS, adapter.latent_shape))
    wanted, pictures = their_steps(folder, kind, noise, negative)
    found = []
    last = adapter.generate(
        PROMPTS, SEEDS, STEPS, callback=lambda step: found.append(np.array(step.latent)), negative=negative
    )
    size = np.abs(wanted).max(axis=(1, 2, 3, 4), keepdims=True)
    return {
        "latents": (np.stack([*found, np.array(last)]) / size, wanted / size),
        "pictures": (adapter.decode(last), pictures),
    }


def worst_pair(folder, name):
    """All sizes of latents and lengths of text in one."""
    found = [network_pair(folder, name, sides, lengths) for sides in SIDES for lengths in LENGTHS.values()]
    ours, theirs = zip(*(one["prediction"] for one in found), strict=True)
    return {"prediction": tuple(np.concatenate([part.reshape(-1) for part in side]) for side in (ours, theirs))}


NETWORKS = [name for name in CONFIGS if " block" not in name]
CASES = {
    **{f"PixArt, {name}": partial(worst_pair, name=name) for name in NETWORKS},
    **{f"PixArt's pipeline, {name}, {STEPS} steps": partial(pipeline_pair, name=name) for name in HOSTS},
}


def differences(folder, case):
    """The largest absolute difference of each output of a case."""
    return {name: float(np.abs(np.array(ours) - theirs).max()) for name, (ours, theirs) in CASES[case](folder).items()}
