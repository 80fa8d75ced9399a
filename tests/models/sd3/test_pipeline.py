"""From prompts to a picture: the same latents in, the same sequence of latents out as diffusers' pipeline."""

from importlib import import_module

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.sampling.sampler import seeded_noise

from support.sd3_folder import write_whole
from support.sd3_transformers import DUAL, LARGE, MEDIUM

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch's tensors in NumPy 2
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPTS = ["A photo of the cat on a mat!", "two dogs, by the café"]
KINDS = {"medium": MEDIUM, "dual": DUAL, "large": LARGE}
STEPS, CFG = 10, 4.5


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return write_whole(tmp_path_factory.mktemp(request.param), KINDS[request.param])


@pytest.fixture(scope="module")
def model(folder):
    return mq.load(folder, size=(96, 64))


@pytest.fixture(scope="module")
def pipe(folder):
    return their_pipeline(folder)


def their_pipeline(folder, kind="StableDiffusion3Pipeline", **components):
    pipe = getattr(import_module("diffusers"), kind).from_pretrained(folder, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def torch_latents(latent):
    return import_module("torch").from_numpy(np.array(latent).transpose(0, 3, 1, 2).copy())


def sequence(pipe, **arguments):
    """Latents [B,H,W,C] before the first step and after each, of diffusers."""
    found = []

    def keep(_, index, time, values):
        found.append(values["latents"].numpy().transpose(0, 2, 3, 1).copy())
        return {}

    pipe(num_inference_steps=STEPS, output_type="latent", callback_on_step_end=keep, **arguments)
    return found


def equal(ours, theirs, tolerance=1e-4):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.array(one), other, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("negative", [None, "a dog"])
def test_the_same_sequence_of_latents(model, pipe, negative):
    adapter, steps = model.adapter, []
    noise = seeded_noise([5, 6], adapter.latent_shape)
    last = adapter.generate(PROMPTS, [5, 6], STEPS, CFG, lambda step: steps.append(step.latent), negative)
    theirs = sequence(
        pipe,
        prompt=PROMPTS,
        negative_prompt=None if negative is None else [negative] * 2,
        guidance_scale=CFG,
        latents=torch_latents(noise),
        height=64,
        width=96,
    )
    np.testing.assert_array_equal(np.array(steps[0]), np.array(noise))
    equal([*steps[1:], last], theirs)


@pytest.mark.parametrize("strength", [0.6, 0.35, 1.0])
def test_from_an_image(folder, model, strength):
    """diffusers takes what has as many channels as a latent for one. 3.5 steps are 4."""
    adapter, steps = model.adapter, []
    pictures = np.random.default_rng(0).uniform(size=(2, 64, 96, 3)).astype(np.float32)
    image, noise = adapter.latents(pictures), seeded_noise([5, 6], adapter.latent_shape)
    last = adapter.generate(
        PROMPTS, [5, 6], STEPS, CFG, lambda step: steps.append(step.latent), image=image, strength=strength
    )
    pipe = their_pipeline(folder, "StableDiffusion3Img2ImgPipeline")
    with import_module("torch").no_grad():
        encoded = pipe.vae.encode(torch_latents(pictures * 2 - 1)).latent_dist.mode()
    encoded = (encoded - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    np.testing.assert_allclose(np.array(image), encoded.numpy().transpose(0, 2, 3, 1), atol=1e-5)
    module = import_module("diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *arguments, **options: torch_latents(noise))
        theirs = sequence(
            pipe, prompt=PROMPTS, image=torch_latents(image), strength=strength, guidance_scale=CFG, height=64, width=96
        )
    assert len(theirs) == {0.6: 6, 0.35: 4, 1.0: 10}[strength]
    equal([*steps[1:], last], theirs)


def test_the_same_picture(model, pipe):
    noise = seeded_noise([7], model.adapter.latent_shape)
    ours = model.images([mq.Prompt(7, PROMPTS[0])], STEPS, CFG)
    theirs = pipe(
        PROMPTS[0],
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        latents=torch_latents(noise),
        height=64,
        width=96,
        output_type="np",
    ).images
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_same_text(model, pipe):
    with import_module("torch").no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    ours = model.adapter.encode(PROMPTS)
    assert ours["tokens"].shape == (2, 77 + 256, 80)
    for one, other in ((ours["tokens"], tokens), (ours["pooled"], pooled)):
        np.testing.assert_allclose(np.array(one), other.numpy(), atol=2e-5 * np.abs(other.numpy()).max())


def test_without_t5(tmp_path, caplog):
    folder = write_whole(tmp_path, MEDIUM, t5=False)
    adapter, pipe = mq.load(folder, size=64).adapter, their_pipeline(folder, text_encoder_3=None, tokenizer_3=None)
    assert pipe.text_encoder_3 is None
    with import_module("torch").no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    ours = adapter.encode(PROMPTS)
    for one, other in ((ours["tokens"], tokens), (ours["pooled"], pooled)):
        np.testing.assert_allclose(np.array(one), other.numpy(), atol=2e-5 * np.abs(other.numpy()).max())
    assert not ours["tokens"][:, 77:].any()
    assert "has no text_encoder_3 (T5): drawing without it, as diffusers does" in caplog.text
    assert adapter.encode(["something else"])["tokens"].dtype == mx.float32
