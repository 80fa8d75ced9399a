"""Prompts are encoded once, and the last of them kept."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.models import prompt_memory
from mlxquant.models.prompt_memory import PromptMemory
from mlxquant.sampling.conditioning import Conditioning


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(prompt_memory, "KEPT", 3)
    return []


def encoder(asked):
    def encode(prompts):
        asked.append(prompts)
        numbers = mx.array([float(prompt) for prompt in prompts])
        return Conditioning(a=numbers[:, None], b=numbers)

    return encode


def test_each_is_encoded_once_and_all_at_once(asked):
    memory = PromptMemory()
    found = memory.encoded(["1", "2", "1"], encoder(asked))
    np.testing.assert_array_equal(np.array(found["a"]), [[1], [2], [1]])
    np.testing.assert_array_equal(np.array(found["b"]), [1, 2, 1])
    memory.encoded(["2", "3"], encoder(asked))
    assert asked == [["1", "2"], ["3"]]


def test_the_last_used_are_kept(asked):
    memory = PromptMemory()
    for text in ("1", "2", "3", "1", "4"):
        memory.encoded([text], encoder(asked))
    memory.encoded(["3", "1", "4"], encoder(asked))
    assert asked == [["1"], ["2"], ["3"], ["4"]]
    memory.encoded(["2"], encoder(asked))
    assert asked[4:] == [["2"]]


def test_more_are_kept_where_more_were_asked_for(asked):
    memory, many = PromptMemory(), [str(number) for number in range(5)]
    memory.encoded(many, encoder(asked))
    memory.encoded(many, encoder(asked))
    assert asked == [many]
