"""The one loop that draws: always the same batches, from any of them on."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.sampling.batches import drawn_batches
from mlxquant.sampling.prompts import Prompt

from support.tiny_pictures import tiny_adapter

COLOURS = ("red", "blue", "green", "yellow", "cyan")
PROMPTS = [Prompt(seed, f"a large {colour} circle at left on white background") for seed, colour in enumerate(COLOURS)]


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter()


def test_batches_have_their_places_and_prompts(adapter):
    found = list(drawn_batches(adapter, PROMPTS, 2, 1.0, size=2))
    assert [batch.places for batch in found] == [range(2), range(2, 4), range(4, 5)]
    assert [prompt for batch in found for prompt in batch.prompts] == PROMPTS
    assert all(batch.final.shape == (len(batch.places), *adapter.latent_shape) for batch in found)
    assert all(batch.latents == [] for batch in found)


def test_a_run_that_goes_on_draws_the_same(adapter):
    whole = list(drawn_batches(adapter, PROMPTS, 2, 2.0, size=2, latents=True))
    rest = list(drawn_batches(adapter, PROMPTS, 2, 2.0, size=2, latents=True, starts=[2, 4]))
    assert [batch.places for batch in rest] == [range(2, 4), range(4, 5)]
    for one, other in zip(whole[1:], rest, strict=True):
        for a, b in zip([*one.latents, one.final], [*other.latents, other.final], strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))


def test_kept_latents_are_what_the_callback_sees(adapter):
    steps = []
    (batch,) = drawn_batches(adapter, PROMPTS[:2], 3, 2.0, latents=True, callback=steps.append)
    assert [step.index for step in steps] == [0, 1, 2]
    for step, latent in zip(steps, batch.latents, strict=True):
        assert mx.array_equal(step.latent, latent).item()


def test_nothing_to_draw_encodes_nothing(adapter, monkeypatch):
    monkeypatch.setattr(adapter, "encode", lambda prompts: pytest.fail("encoded"))
    assert list(drawn_batches(adapter, PROMPTS, 2, 1.0, starts=[])) == []
