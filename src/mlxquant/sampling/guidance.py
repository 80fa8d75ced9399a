"""Classifier-free guidance: one prediction out of two."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .conditioning import Conditioning

Velocity = Callable[[mx.array, mx.array, mx.array, float], mx.array]


def guided(
    velocity: Velocity, latent: mx.array, sigma: float, text: Conditioning, empty: Conditioning, cfg: float
) -> mx.array:
    """Classifier-free guidance ``u + cfg (c - u)`` (arXiv 2207.12598) for any cfg >= 0; 1 and 0 need one side, others
    both in one batch.
    """
    if cfg in (0, 1):
        side = text if cfg == 1 else empty
        return velocity(latent, side.tokens, side.pooled, sigma)
    both = text.joined(empty)
    conditional, unconditional = mx.split(
        velocity(mx.concatenate([latent, latent]), both.tokens, both.pooled, sigma), 2
    )
    return unconditional + cfg * (conditional - unconditional)
