"""The whole pipeline against diffusers' StableDiffusionPipeline: a folder as the hub has it, the same noise in, the
same latents after every step out, and the same picture.

Needs ``pip install 'mlxquant[diffusers]'``, after a CPU build of torch, and transformers.
"""

import mlxquant as mq

# isort: split

import numpy as np
import pytest

from mlxquant.sampling.sampler import seeded_noise

from support.tiny_unet import CONFIGS, SCHEDULER, write_folder

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore"),  # of torch, diffusers and transformers
]

STEPS, CFG = 10, 7.5
PROMPT, NEGATIVE = "the cat on the cat", "a cat"
CASES = {  # by name: UNet, scheduler
    "1.5": ("1.5", {}),
    "1.5 ddim": ("1.5", {"_class_name": "DDIMScheduler"}),
    "2.1": ("2.1", {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}),
    "2.1 pndm": ("2.1", {"prediction_type": "v_prediction"}),
    "1.5 dpm": ("1.5", {"_class_name": "DPMSolverMultistepScheduler"}),
}


def channels_first(latents):
    return pytest.importorskip("torch").from_numpy(np.array(latents).transpose(0, 3, 1, 2).copy())


def theirs(folder, pipeline, **options):
    """Latents after every step [steps,C,H,W] and the picture [H,W,3] of diffusers."""
    pipeline = getattr(pytest.importorskip("diffusers"), pipeline).from_pretrained(
        folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def keep(pipe, step, time, kwargs):
        seen.append(kwargs["latents"][0].numpy().copy())
        return kwargs

    picture = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        callback_on_step_end=keep,
        output_type="np",
        **options,
    ).images[0]
    return np.stack(seen), picture


def equal(ours, expected):
    """Latents after every step."""
    scale = max(1, np.abs(expected).max())
    for index, (one, other) in enumerate(zip(ours, expected, strict=True)):
        np.testing.assert_allclose(one, other.transpose(1, 2, 0), atol=1e-4 * scale, err_msg=f"step {index}")


def drawn(adapter, **options):
    """Latents after every step of ours, and the last ones as they are."""
    steps = []
    final = adapter.generate([PROMPT], [5], STEPS, CFG, steps.append, NEGATIVE, **options)
    return [np.array(step.latent[0]) for step in steps[1:]] + [np.array(final[0])], final


@pytest.mark.parametrize("name", CASES)
def test_the_same_latents_and_the_same_picture(tmp_path, name):
    unet, scheduler = CASES[name]
    write_folder(tmp_path, CONFIGS[unet], {**SCHEDULER, **scheduler})
    adapter = mq.load(str(tmp_path)).adapter
    noise = seeded_noise([5], adapter.latent_shape)
    size = {"height": adapter.size[1], "width": adapter.size[0]}
    expected, picture = theirs(tmp_path, "StableDiffusionPipeline", latents=channels_first(noise), **size)
    ours, final = drawn(adapter)
    assert len(ours) == STEPS + (type(adapter.scheduler).__name__ == "PNDM")
    equal(ours, expected)
    np.testing.assert_allclose(adapter.decode(final)[0], picture, atol=1e-3)


def test_the_same_from_an_image(tmp_path, monkeypatch):
    """diffusers takes what has as many channels as a latent for one."""
    write_folder(tmp_path, CONFIGS["1.5"], {**SCHEDULER, "_class_name": "DDIMScheduler"})
    adapter = mq.load(str(tmp_path)).adapter
    image = adapter.latents(np.random.default_rng(0).uniform(size=(1, 64, 64, 3)).astype(np.float32))
    noise = seeded_noise([5], adapter.latent_shape)
    module = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img")
    monkeypatch.setattr(module, "randn_tensor", lambda *arguments, **options: channels_first(noise))
    expected, _ = theirs(tmp_path, "StableDiffusionImg2ImgPipeline", image=channels_first(image), strength=0.6)
    ours, _ = drawn(adapter, image=image, strength=0.6)
    assert len(ours) == 6
    equal(ours, expected)
