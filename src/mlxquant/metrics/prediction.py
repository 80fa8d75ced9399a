"""How well a language model predicts text that it has not seen: bits per character, which models with other tokens
share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import CalibrationError, NumericsError
from ..models.language import Tokenizer, Tokens
from ..numerics.arrays import Array
from ..progress import Progress, silent


@dataclass(frozen=True)
class Prediction:
    """``nats`` [windows] float64: what the tokens of each window cost, summed; ``tokens`` and ``characters`` [windows]:
    their numbers.
    """

    nats: Array
    tokens: Array
    characters: Array

    @property
    def bits_per_character(self) -> float:
        return float(self.nats.sum() / np.log(2) / self.characters.sum())

    @property
    def each(self) -> Array:
        """Bits per character of each window, weighted so that their mean is that of all: float64 [windows]."""
        return self.nats / np.log(2) / self.characters.mean()

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return float(np.exp(self.nats.sum() / self.tokens.sum()))


def predict(
    logits: Callable[[mx.array], mx.array],
    tokenizer: Tokenizer,
    text: str,
    length: int,
    limit: int | None = None,
    batch: int = 4,
    progress: Progress = silent,
) -> Prediction:
    """Cost of every token but the first, in windows of ``length`` that follow each other; each is predicted from those
    before it in its window and, for the first of a window, from the last of the window before alone.

    ``logits`` maps tokens [B,T] to logits [B,T,V]. ``limit`` windows at most, evenly spread over the text. Raises
    CalibrationError when the text is too short for one, NumericsError on NaN logits.
    """
    if length < 1 or (limit is not None and limit < 1):
        raise CalibrationError(f"windows of {length} tokens, {limit} of them at most; expected at least 1 of both")
    tokens = tokenizer.encode(text)
    count = (len(tokens) - 1) // length
    if count < 1:
        raise CalibrationError(
            f"a text of {len(tokens)} tokens is too short to be predicted in windows of {length}; pass a longer one"
        )
    some: Tokens = np.arange(count, dtype=np.int32) if limit is None or limit >= count else spread(count, limit)
    return predict_windows(logits, tokenizer, cut(tokens, length, some), batch, progress)


def spread(count: int, limit: int) -> Tokens:
    """Which ``limit`` of ``count`` windows are looked at: evenly spread, the first and the last among them."""
    return np.linspace(0, count - 1, limit).round().astype(np.int32)


def cut(tokens: Tokens, length: int, some: Tokens) -> Tokens:
    """Windows of a text by number [n], each with the token that follows it: int32 [n,length+1]."""
    return np.stack([tokens[index * length : (index + 1) * length + 1] for index in some])


def predict_windows(
    logits: Callable[[mx.array], mx.array],
    tokenizer: Tokenizer,
    windows: Tokens,
    batch: int = 4,
    progress: Progress = silent,
) -> Prediction:
    """Cost of every token but the first in each of ``windows`` int32 [n,length+1]. Raises NumericsError on NaN
    logits.
    """
    nats = []
    for start in progress(range(0, len(windows), batch), "predicting"):
        part = mx.array(windows[start : start + batch])
        cost = nn.losses.cross_entropy(logits(part[:, :-1]).astype(mx.float32), part[:, 1:]).sum(-1)
        nats.append(np.array(cost, np.float64))
    found = np.concatenate(nats)
    if not np.isfinite(found).all():
        raise NumericsError("the model predicts NaN or infinite costs; its weights are damaged or overflow")
    lengths = np.full(len(windows), windows.shape[1] - 1)
    return Prediction(found, lengths, np.array([_characters(tokenizer, window[1:]) for window in windows]))


def _characters(tokenizer: Tokenizer, tokens: Tokens) -> int:
    return max(1, len(tokenizer.decode(tokens.tolist())))
