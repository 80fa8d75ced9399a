"""Stable Diffusion 3 and 3.5 in diffusers, from the same tiny folders, and how far ours is from it: name of a case to
what computes both, relative to the largest value.
"""

import mlxquant as mq  # before mlx

# isort: split
from functools import partial
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.layers.tree import parameters
from mlxquant.models.sd3 import names
from mlxquant.sampling.sampler import seeded_noise

from support.sd3_folder import write_whole
from support.sd3_transformers import DUAL, KINDS, LARGE, MEDIUM, random_transformer

PROMPTS = ["A photo of the cat on a mat!", "two dogs, by the café"]
SEEDS, STEPS, CFG, SIZE = [5, 6], 10, 4.5, (96, 64)


def inputs(said, batch=2, height=8, width=12):
    """What the transformer of a configuration reads: latent, tokens, pooled, t."""
    keys = mx.random.split(mx.random.key(5), 3)
    latent = mx.random.normal((batch, height, width, said["in_channels"]), key=keys[0])
    tokens = mx.random.normal((batch, 7, said["joint_attention_dim"]), key=keys[1])
    pooled = mx.random.normal((batch, said["pooled_projection_dim"]), key=keys[2])
    return latent, tokens, pooled, mx.array([900.0, 37.5])


def tensor(values):
    return import_module("torch").from_numpy(np.array(values))


def channels_first(values):
    """[B,H,W,C] as torch has it."""
    return tensor(np.array(values).transpose(0, 3, 1, 2).copy())


def transformer_pair(folder, said):
    """What both predict; diffusers' takes every tensor of ours, and lacks none."""
    model = random_transformer(said)
    given = names.to_diffusers(parameters(model), model.config)
    other = import_module("diffusers").SD3Transformer2DModel(**said)
    other.load_state_dict({name: tensor(value) for name, value in given.items()}, strict=True)
    latent, *rest = inputs(said)
    with import_module("torch").no_grad():
        found = other.eval()(channels_first(latent), *map(tensor, rest)).sample.numpy()
    return {"velocity": (model(latent, *rest), found.transpose(0, 2, 3, 1))}


def their_pipeline(folder, kind="StableDiffusion3Pipeline", **components):
    pipe = getattr(import_module("diffusers"), kind).from_pretrained(folder, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_latents(pipe, **arguments):
    """Latents [B,H,W,C] after each step."""
    found = []

    def keep(_, index, time, values):
        found.append(values["latents"].numpy().transpose(0, 2, 3, 1).copy())
        return {}

    shape = {"width": SIZE[0], "height": SIZE[1], "num_inference_steps": STEPS, "guidance_scale": CFG}
    pipe(prompt=PROMPTS, output_type="latent", callback_on_step_end=keep, **shape, **arguments)
    return found


def our_latents(adapter, **arguments):
    """The same, of ours."""
    steps = []
    last = adapter.generate(PROMPTS, SEEDS, STEPS, CFG, lambda step: steps.append(step.latent), **arguments)
    return [*map(np.array, steps[1:]), np.array(last)]


def loaded(folder, said):
    adapter = mq.load(write_whole(folder, said), size=SIZE).adapter
    return adapter, seeded_noise(SEEDS, adapter.latent_shape)


def text_to_image(folder, said, negative=None):
    """Latents after each of ten guided steps, and the pictures."""
    adapter, noise = loaded(folder, said)
    ours, pipe = our_latents(adapter, negative=negative), their_pipeline(folder)
    other = None if negative is None else [negative] * len(PROMPTS)
    theirs = their_latents(pipe, latents=channels_first(noise), negative_prompt=other)
    drawn = (channels_first(theirs[-1]) / pipe.vae.config.scaling_factor) + pipe.vae.config.shift_factor
    with import_module("torch").no_grad():
        pictures = (pipe.vae.decode(drawn).sample / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
    return {
        "latents": (np.stack(ours), np.stack(theirs)),
        "pictures": (adapter.decode(mx.array(ours[-1])), pictures),
    }


def image_to_image(folder, said, strength):
    """Of a picture that is encoded first. diffusers takes what has as many channels as a latent for one."""
    adapter, noise = loaded(folder, said)
    pictures = np.random.default_rng(0).uniform(size=(2, SIZE[1], SIZE[0], 3)).astype(np.float32)
    image = adapter.latents(pictures)
    pipe = their_pipeline(folder, "StableDiffusion3Img2ImgPipeline")
    with import_module("torch").no_grad():
        encoded = pipe.vae.encode(channels_first(pictures * 2 - 1)).latent_dist.mode()
    encoded = (encoded - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    module = import_module("diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *arguments, **options: channels_first(noise))
        theirs = their_latents(pipe, image=channels_first(image), strength=strength)
    ours = our_latents(adapter, image=image, strength=strength)
    assert len(ours) == len(theirs)
    return {
        "encoded": (image, encoded.numpy().transpose(0, 2, 3, 1)),
        "latents": (np.stack(ours), np.stack(theirs)),
    }


def text_pair(folder, said, t5=True):
    """What the transformer reads of prompts."""
    adapter = mq.load(write_whole(folder, said, t5)).adapter
    pipe = their_pipeline(folder, **({} if t5 else {"text_encoder_3": None, "tokenizer_3": None}))
    with import_module("torch").no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    ours = adapter.encode(PROMPTS)
    return {"tokens": (ours["tokens"], tokens.numpy()), "pooled": (ours["pooled"], pooled.numpy())}


TITLES = {"medium": "SD3-Medium", "dual": "SD3.5-Medium", "large": "SD3.5-Large"}
SAID = {"medium": MEDIUM, "dual": DUAL, "large": LARGE}
CASES = {f"transformer, {TITLES.get(kind, kind)}": partial(transformer_pair, said=KINDS[kind]) for kind in KINDS}
CASES |= {
    "text, with T5": partial(text_pair, said=MEDIUM),
    "text, without T5": partial(text_pair, said=MEDIUM, t5=False),
    **{f"10 guided steps, {title}": partial(text_to_image, said=SAID[kind]) for kind, title in TITLES.items()},
    "10 guided steps, a negative prompt": partial(text_to_image, said=DUAL, negative="a dog"),
    **{
        f"from an image, strength {strength:g}": partial(image_to_image, said=DUAL, strength=strength)
        for strength in (0.35, 0.6, 1.0)
    },
}
LIMITS = {"latents": 1e-4, "pictures": 1e-4}  # of what is computed again and again; else 1e-5


def differences(folder, case):
    """The largest difference of each output of a case, of its largest value."""
    found = {}
    for name, (ours, theirs) in CASES[case](folder).items():
        assert ours.shape == theirs.shape
        found[name] = float(np.abs(np.array(ours) - theirs).max() / np.abs(theirs).max())
    return found
