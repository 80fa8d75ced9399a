"""What text encoders hand to a model that draws."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Conditioning:
    """What the text encoders say: tokens [B,T,E] and pooled [B,P]."""

    tokens: mx.array
    pooled: mx.array

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def joined(self, other: Conditioning) -> Conditioning:
        return Conditioning(mx.concatenate([self.tokens, other.tokens]), mx.concatenate([self.pooled, other.pooled]))

    def take(self, rows: slice) -> Conditioning:
        return Conditioning(self.tokens[rows], self.pooled[rows])
