"""PixArt from a folder of the hub's layout, against diffusers' pipelines on the same folder: the same latents in, the
same sequence of latents out.
"""

import mlxquant as mq  # before mlx

# isort: split
import numpy as np
import pytest

from mlxquant.models.pixart.adapter import PixArtAlpha, PixArtSigma
from mlxquant.sampling.sampler import seeded_noise

from support.pixart import write_pixart

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch's tensors in NumPy 2
]
HOSTS = {"512": PixArtAlpha, "1024": PixArtAlpha, "sigma": PixArtSigma, "no variance": PixArtAlpha}
PROMPTS, SEEDS, STEPS = ["  A photo of a CAT", "the quick brown fox, at 4 o'clock"], [3, 8], 10


@pytest.fixture(scope="module", params=HOSTS)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("pixart")
    return write_pixart(place, request.param, HOSTS[request.param]), HOSTS[request.param]


def theirs(place, kind, noise, negative, size):
    """Latents before each step and after the last, and pictures."""
    import diffusers
    import torch

    pipe = getattr(diffusers, kind.pipeline).from_pretrained(place)
    pipe.set_progress_bar_config(disable=True)
    latents = [noise]
    pictures = pipe(
        PROMPTS,
        negative_prompt=negative,
        num_inference_steps=STEPS,
        guidance_scale=kind.cfg,
        width=size[0],
        height=size[1],
        latents=torch.tensor(np.ascontiguousarray(noise.transpose(0, 3, 1, 2))),
        output_type="np",
        clean_caption=False,
        use_resolution_binning=False,
        callback=lambda step, t, latent: latents.append(latent.numpy().transpose(0, 2, 3, 1)),
    ).images
    return latents, pictures


@pytest.mark.parametrize("negative", ["", "green hills"])
def test_the_same_latents_and_pictures(folder, negative):
    place, kind = folder
    adapter = mq.load(place).adapter
    assert type(adapter) is kind
    adapter.resize((96, 64))
    noise = np.array(seeded_noise(SEEDS, adapter.latent_shape))
    wanted, pictures = theirs(place, kind, noise, negative, adapter.size)
    found = []
    last = adapter.generate(
        PROMPTS, SEEDS, STEPS, callback=lambda step: found.append(np.array(step.latent)), negative=negative
    )
    found.append(np.array(last))
    assert len(found) == len(wanted) == STEPS + 1
    for step, (ours, other) in enumerate(zip(found, wanted, strict=True)):
        size = np.abs(other).max()  # a model that was not trained lets latents grow
        np.testing.assert_allclose(ours / size, other / size, atol=1e-4, err_msg=f"before step {step}")
    assert np.abs(wanted[-1] - noise).max() > 0.3
    np.testing.assert_allclose(adapter.decode(last), pictures, atol=1e-4)
