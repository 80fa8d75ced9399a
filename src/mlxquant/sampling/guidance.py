"""Classifier-free guidance: one prediction out of two, and which rows of a batch the two are.

What a guided model reads has two sides, with the prompt and with the empty prompt. Whoever shows a model what it sees
while it is sampled (calibration, statistics, caches) asks here how many sides there are and in which order their rows
come, so that this is decided once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import isfinite

import mlx.core as mx

from ..errors import AdapterError
from .conditioning import Conditioning

Velocity = Callable[[mx.array, mx.array, mx.array, float], mx.array]


def check_weight(cfg: float) -> None:
    """Raise AdapterError on a weight that guidance cannot have."""
    if not (isfinite(cfg) and cfg >= 0):
        raise AdapterError(f"cfg weight must be a finite number >= 0, found {cfg}")


def sides(cfg: float) -> tuple[bool, ...]:
    """The predictions that guidance asks of a model, in the order of their rows: True with the prompt, False with the
    empty one. At cfg 0 and 1 one of them is multiplied by zero, and is not asked for.
    """
    return (cfg == 1,) if cfg in (0, 1) else (True, False)


def guided_rows(pictures: Sequence[int], cfg: float, side_by_side: bool = False) -> list[tuple[int, bool]]:
    """The rows of a guided batch of ``pictures``: which of them, and whether with its prompt.

    As the sampler has them, first all that have their prompt, then all that have not; ``side_by_side`` picture by
    picture.
    """
    if side_by_side:
        return [(picture, prompted) for picture in pictures for prompted in sides(cfg)]
    return [(picture, prompted) for prompted in sides(cfg) for picture in pictures]


def guided(
    velocity: Velocity, latent: mx.array, sigma: float, text: Conditioning, empty: Conditioning, cfg: float
) -> mx.array:
    """Classifier-free guidance ``u + cfg (c - u)`` (arXiv 2207.12598) for any cfg >= 0, its sides in one batch."""
    asked = [text if prompted else empty for prompted in sides(cfg)]
    read = reduce(Conditioning.joined, asked)
    seen = velocity(mx.concatenate([latent] * len(asked)), read.tokens, read.pooled, sigma)
    if len(asked) == 1:
        return seen
    conditional, unconditional = mx.split(seen, 2)
    return unconditional + cfg * (conditional - unconditional)
