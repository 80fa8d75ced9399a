"""Tokens from a language model: any module from tokens [B,T] to logits [B,T,V]. Without a cache: each token runs the
model anew.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..errors import CalibrationError, RecipeError
from ..progress import Progress, silent


def sample_tokens(
    model: nn.Module,
    prompt: npt.ArrayLike,
    count: int,
    temperature: float = 1.0,
    seed: int = 0,
    context: int | None = None,
    progress: Progress = silent,
) -> npt.NDArray[np.int32]:
    """``prompt`` int [T] or [B,T], continued by ``count`` tokens: int32, of as many dimensions.

    At ``temperature`` 0 the likeliest token each time, without chance. ``context`` is how many tokens the model can
    see; older ones drop out. The prompt's own length changes nothing for the seed: token n after it has the n-th key.
    Raises CalibrationError without a prompt.
    """
    if temperature < 0 or count < 0:
        raise RecipeError(f"a temperature of {temperature} for {count} tokens; expected numbers from 0")
    given = np.asarray(prompt)
    if given.ndim not in (1, 2) or not given.size or not np.issubdtype(given.dtype, np.integer):
        raise CalibrationError(
            f"a prompt of {given.dtype} {given.shape}; expected at least one integer token, [length] or [batch, length]"
        )
    tokens = mx.array(np.atleast_2d(given).astype(np.int32))
    for key in progress(mx.random.split(mx.random.key(seed), count) if count else [], "tokens"):
        seen = tokens if context is None else tokens[:, -context:]
        logits = model(seen)[:, -1].astype(mx.float32)
        drawn = mx.random.categorical(logits / temperature, key=key) if temperature else logits.argmax(-1)
        tokens = mx.concatenate([tokens, drawn[:, None].astype(mx.int32)], axis=1)
        mx.eval(tokens)
    out = np.array(tokens)
    return out[0] if given.ndim == 1 else out
