"""Stable Diffusion 1.5 and 2.1 in diffusers, from the same tiny folders, and how far ours is from it: name of a case to
what computes both, relative to the largest value.
"""

import mlxquant as mq  # before mlx

# isort: split
from functools import partial
from importlib import import_module

import mlx.core as mx
import numpy as np

from mlxquant.models.parts.loading import fill
from mlxquant.models.unet.chain import unet_stages
from mlxquant.models.unet.config import UNetConfig
from mlxquant.models.unet.network import UNet
from mlxquant.sampling.sampler import seeded_noise

from support.tiny_unet import CONFIGS, SCHEDULER, in_torch, random_unet, write_folder

STEPS, CFG = 10, 7.5
PROMPT, NEGATIVE = "the cat on the cat", "a cat"


def tensor(values):
    return import_module("torch").from_numpy(np.array(values))


def channels_first(values):
    """[B,H,W,C] as torch has it."""
    return tensor(np.array(values).transpose(0, 3, 1, 2).copy())


def their_unet(said, weights):
    """diffusers' network, which takes every tensor of ours, and lacks none."""
    other = import_module("diffusers").UNet2DConditionModel.from_config(said)
    other.load_state_dict({name: tensor(value) for name, value in weights.items()}, strict=True)
    return other.eval()


def unet_pair(folder, name, size=(12, 8)):
    """What both predict for a batch of different times."""
    said, rng = CONFIGS[name], np.random.default_rng(0)
    weights, model = in_torch(random_unet(said)), UNet(UNetConfig.from_dict(said))
    fill(model, weights, mx.float32, name)
    shapes = (2, *size, 4), (2, 7, said["cross_attention_dim"])
    latent, text = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    t = np.array([3.0, 901.0], np.float32)
    with import_module("torch").no_grad():
        found = their_unet(said, weights)(channels_first(latent), tensor(t), tensor(text)).sample.numpy()
    state = {"latent": mx.array(latent), "t": mx.array(t), "text": mx.array(text)}
    for stage in unet_stages(model):
        state = stage.run(state)
    return {"prediction": (state["velocity"], found.transpose(0, 2, 3, 1))}


def theirs(folder, pipeline, **options):
    """Latents after every step [steps,H,W,C] and the picture [H,W,3] of diffusers."""
    pipe = getattr(import_module("diffusers"), pipeline).from_pretrained(
        folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def keep(_, step, time, values):
        seen.append(values["latents"][0].numpy().transpose(1, 2, 0).copy())
        return values

    asked = {"num_inference_steps": STEPS, "guidance_scale": CFG, "negative_prompt": NEGATIVE}
    picture = pipe(PROMPT, callback_on_step_end=keep, output_type="np", **asked, **options).images[0]
    return np.stack(seen), picture


def drawn(adapter, **options):
    """Latents after every step of ours [steps,H,W,C], and the picture [H,W,3]."""
    steps = []
    final = adapter.generate([PROMPT], [5], STEPS, CFG, steps.append, NEGATIVE, **options)
    latents = np.stack([*(np.array(step.latent[0]) for step in steps[1:]), np.array(final[0])])
    return latents, adapter.decode(final)[0]


def pipeline_pair(folder, unet, **scheduler):
    """Of the same noise."""
    write_folder(folder, CONFIGS[unet], {**SCHEDULER, **scheduler})
    adapter = mq.load(str(folder)).adapter
    noise, (width, height) = seeded_noise([5], adapter.latent_shape), adapter.size
    found = theirs(folder, "StableDiffusionPipeline", latents=channels_first(noise), height=height, width=width)
    return dict(zip(("latents", "picture"), zip(drawn(adapter), found, strict=True), strict=True))


def image_pair(folder):
    """From an image, with DDIM: PNDM falls one step behind in diffusers, which takes what has as many channels as a
    latent for one.
    """
    write_folder(folder, CONFIGS["1.5"], {**SCHEDULER, **DDIM})
    adapter = mq.load(str(folder)).adapter
    image = adapter.latents(np.random.default_rng(0).uniform(size=(1, 64, 64, 3)).astype(np.float32))
    noise, place = seeded_noise([5], adapter.latent_shape), "stable_diffusion.pipeline_stable_diffusion_img2img"
    module = import_module(f"diffusers.pipelines.{place}")
    own, module.randn_tensor = module.randn_tensor, lambda *arguments, **options: channels_first(noise)
    try:
        found, _ = theirs(folder, "StableDiffusionImg2ImgPipeline", image=channels_first(image), strength=0.6)
    finally:
        module.randn_tensor = own
    return {"latents": (drawn(adapter, image=image, strength=0.6)[0], found)}


DDIM, V = {"_class_name": "DDIMScheduler"}, {"prediction_type": "v_prediction"}
CASES = {
    "UNet as in 1.5": partial(unet_pair, name="1.5"),
    "UNet as in 2.1": partial(unet_pair, name="2.1"),
    "UNet as in 1.5, odd sizes": partial(unet_pair, name="1.5", size=(7, 9)),
    "UNet as in 2.1, odd sizes": partial(unet_pair, name="2.1", size=(7, 9)),
    "UNet without attention in some blocks": partial(unet_pair, name="mixed"),
    "pipeline of 1.5, PNDM": partial(pipeline_pair, unet="1.5"),
    "pipeline of 1.5, DDIM": partial(pipeline_pair, unet="1.5", **DDIM),
    "pipeline of 1.5, DPM-Solver++": partial(pipeline_pair, unet="1.5", _class_name="DPMSolverMultistepScheduler"),
    "pipeline of 2.1, DDIM": partial(pipeline_pair, unet="2.1", **DDIM, **V),
    "pipeline of 2.1, PNDM": partial(pipeline_pair, unet="2.1", **V),
    "pipeline of 1.5 from an image": image_pair,
}


def differences(folder, case):
    """The largest of each output of a case, relative to its largest value."""
    found = {}
    for name, pair in CASES[case](folder).items():
        ours, other = (np.array(side, np.float64) for side in pair)
        assert ours.shape == other.shape, (case, name)
        found[name] = float(np.abs(ours - other).max() / np.abs(other).max())
    return found
