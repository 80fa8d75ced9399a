"""What a rotated model has in place of its last norm where one matrix is its first and its last layer."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..layers.own import OwnModule


class TurnedNorm(OwnModule):
    """The last norm of a model whose output is its token embedding: it turns the stream back, norms it, and turns it
    again.

    One matrix serves as the first and the last layer, and what stands between the norm's gain and the vocabulary can
    only be a rotation if all gains are equal. So this norm keeps its gain, and ``rotation`` [D,D] costs as much as one
    attention projection.
    """

    def __init__(self, norm: nn.Module, rotation: mx.array):
        super().__init__()
        self.norm, self.rotation = norm, rotation
        self.freeze(recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.norm((x.astype(mx.float32) @ self.rotation.T).astype(x.dtype))
        return (y.astype(mx.float32) @ self.rotation).astype(x.dtype)
