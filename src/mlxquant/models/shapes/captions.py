"""Tokenizer and text conditioner of ``mmdit-shapes``: one word, one token."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .scenes import BACKGROUNDS, COLOURS, PLACES, RADII, RELATIONS, SHAPES, parse

LENGTH = 12  # the longest caption has 11 words
PAD = 0
WORDS = tuple(
    sorted({*COLOURS, *BACKGROUNDS, *SHAPES, *RADII, "a", "on", "background", *" ".join((*PLACES, *RELATIONS)).split()})
)
_INDEX = {word: i + 1 for i, word in enumerate(WORDS)}


def tokenize(caption: str) -> list[int]:
    """Caption to ``LENGTH`` token ids, padded with 0; the empty caption is the unconditional one.

    Raises AdapterError, with the grammar, on a caption that the model was not trained for.
    """
    words = parse(caption).caption.split() if caption.strip() else []
    return [_INDEX[word] for word in words] + [PAD] * (LENGTH - len(words))


class CaptionEncoder(nn.Module):
    """Token ids [B,T] to token embeddings [B,T,E] and their projected mean [B,P]."""

    def __init__(self, dims: int, pooled_dims: int):
        super().__init__()
        self.token = nn.Embedding(len(WORDS) + 1, dims)
        self.position = nn.Embedding(LENGTH, dims)
        self.pool = nn.Linear(dims, pooled_dims)

    def __call__(self, ids: mx.array) -> tuple[mx.array, mx.array]:
        tokens = self.token(ids) * (1 + self.position.weight) + self.position.weight
        return tokens, self.pool(tokens.mean(axis=1))
