"""When quantization sets in: one small object that the training loop sets and the quantizing modules read.

It holds the iteration and nothing else. The level and every random number are functions of it, so a run that is killed
and resumed goes on as if nothing had happened.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass
class Ramp:
    """``level`` is 0 for ``warmup`` iterations, then 1, or, with ``full``, on a straight line to 1 at iteration
    ``full``.

    ``iteration`` None is after training: everything is quantized, and rounded to nearest.
    """

    warmup: int = 0
    full: int | None = None
    seed: int = 0
    iteration: int | None = None

    @property
    def level(self) -> float:
        """How much is quantized: 0 is nothing, 1 is all."""
        if self.iteration is None:
            return 1.0
        if self.full is None or self.iteration >= self.full:
            return float(self.iteration >= self.warmup)
        return max(0, self.iteration - self.warmup) / (self.full - self.warmup)

    def key(self, place: str) -> mx.array | None:
        """The key of the random numbers at a place, a module's path, in this iteration; None after training."""
        if self.iteration is None:
            return None
        sequence = np.random.SeedSequence([self.seed, self.iteration, zlib.crc32(place.encode())])
        return mx.random.key(int(sequence.generate_state(1, np.uint64)[0]))
