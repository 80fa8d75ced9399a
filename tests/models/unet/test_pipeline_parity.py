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

SIZE, STEPS, CFG = 64, 10, 7.5
PROMPT, NEGATIVE = "the cat on the cat", "a cat"
CASES = {  # by name: UNet, scheduler
    "1.5": ("1.5", {}),
    "1.5 ddim": ("1.5", {"_class_name": "DDIMScheduler"}),
    "2.1": ("2.1", {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}),
    "2.1 pndm": ("2.1", {"prediction_type": "v_prediction"}),
    "1.5 dpm": ("1.5", {"_class_name": "DPMSolverMultistepScheduler"}),
}


def theirs(folder, noise):
    """Latents after every step [steps,C,H,W] and the picture [H,W,3] of diffusers."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
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
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        latents=torch.from_numpy(np.array(noise).transpose(0, 3, 1, 2).copy()),
        callback_on_step_end=keep,
        output_type="np",
    ).images[0]
    return np.stack(seen), picture


@pytest.mark.parametrize("name", CASES)
def test_the_same_latents_and_the_same_picture(tmp_path, name):
    unet, scheduler = CASES[name]
    write_folder(tmp_path, CONFIGS[unet], {**SCHEDULER, **scheduler})
    adapter = mq.load(str(tmp_path)).adapter
    adapter.resize(SIZE)
    noise, steps = seeded_noise([5], adapter.latent_shape), []
    expected, picture = theirs(tmp_path, noise)
    final = adapter.generate([PROMPT], [5], STEPS, CFG, steps.append, NEGATIVE)
    ours = [np.array(step.latent[0]) for step in steps[1:]] + [np.array(final[0])]
    assert len(ours) == len(expected) == STEPS + name.endswith(("1.5", "pndm"))
    scale = np.abs(expected).max()
    for index, (one, other) in enumerate(zip(ours, expected, strict=True)):
        np.testing.assert_allclose(one, other.transpose(1, 2, 0), atol=1e-4 * max(1, scale), err_msg=f"step {index}")
    np.testing.assert_allclose(adapter.decode(final)[0], picture, atol=1e-3)
