"""Sampling: the same seed, the same text; temperature 0 is greedy; the context slides."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.errors import CalibrationError, RecipeError
from mlxquant.sampling.text import sample_tokens

from support.language_models import tiny_gpt


class Next(nn.Module):
    """Its logits depend on the last token and say the next number is likeliest, by ``sharpness``; it notes how much it
    saw.
    """

    def __init__(self, size=10, sharpness=5.0):
        super().__init__()
        self._size, self._sharpness, self.seen = size, sharpness, []

    def __call__(self, tokens):
        self.seen = [*self.seen, tokens.shape[1]]
        return self._sharpness * (mx.arange(self._size) == ((tokens[..., None] + 1) % self._size)).astype(mx.float32)


def test_greedy_takes_the_likeliest():
    np.testing.assert_array_equal(sample_tokens(Next(), [7], 5, temperature=0), [7, 8, 9, 0, 1, 2])


def test_frequencies_are_those_of_the_softmax():
    for temperature in (0.5, 1.0, 2.0):
        drawn = sample_tokens(Next(sharpness=2.0), np.zeros((20000, 1), int), 1, temperature)[:, 1]
        weight = np.exp(2.0 / temperature)
        expected = weight / (weight + 9)
        assert (drawn == 1).mean() == pytest.approx(expected, abs=5 * np.sqrt(expected * (1 - expected) / 20000))


def test_a_seed_is_a_text_and_rows_differ():
    model, prompt = tiny_gpt(), np.zeros((2, 3), int)
    one = sample_tokens(model, prompt, 12, seed=1)
    assert one.shape == (2, 15)
    assert one.dtype == np.int32
    np.testing.assert_array_equal(one[:, :3], prompt)
    np.testing.assert_array_equal(one, sample_tokens(model, prompt, 12, seed=1))
    assert (one != sample_tokens(model, prompt, 12, seed=2)).any()
    assert (one[0] != one[1]).any()


def test_the_context_slides():
    model = Next()
    sample_tokens(model, [1, 2, 3], 4, context=5)
    assert model.seen == [3, 4, 5, 5]
    assert sample_tokens(tiny_gpt(), [1], 40, context=24).shape == (41,)  # a GPT has no more places


def test_nothing_to_add_gives_the_prompt():
    np.testing.assert_array_equal(sample_tokens(Next(), [4], 0), [4])


@pytest.mark.parametrize("prompt", [[], [0.5], [[[1]]]])
def test_bad_prompts_are_one_clear_error(prompt):
    with pytest.raises(CalibrationError, match="prompt"):
        sample_tokens(Next(), prompt, 3)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"count": -1}])
def test_bad_numbers_are_one_clear_error(options):
    with pytest.raises(RecipeError, match="temperature"):
        sample_tokens(Next(), [1], **{"count": 1, **options})
