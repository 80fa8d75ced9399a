"""Attention whose keys are held in few bits, rotated head by head."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files import schema
from ..files.schema import Schema
from ..grids.reading import TokenReader, represented
from ..layers.own import OwnModule
from ..numerics import cayley

FIXED = 0  # the seed of rotations that are part of a format and not of a run


class HeldHeads(OwnModule):
    """Rounds what another module returns as a key-value cache would hold it: each head of a token on its own scale,
    with ``bits`` bits or, with None, not at all. With ``turned`` heads are rotated first (R3): queries and keys may be,
    for their products stay the same.
    """

    STRUCTURE: ClassVar[Schema] = schema.entries(
        {"size": schema.whole(1, schema.WIDTH), "bits": schema.maybe(schema.whole(2, 8)), "turned": schema.flag}
    )

    def __init__(self, layer: nn.Module, size: int, bits: int | None, turned: bool):
        super().__init__()
        self.layer = layer
        self._size, self._bits, self._turned = size, bits, turned
        self._reader = None if bits is None else TokenReader(bits)

    @property
    def facts(self) -> dict[str, Any]:
        """What it takes to wrap the same module again."""
        return {"size": self._size, "bits": self._bits, "turned": self._turned}

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        y = self.layer(*args, **options)
        heads = y.astype(mx.float32).reshape(*y.shape[:-1], -1, self._size)
        if self._turned:
            heads = heads @ key_rotation(self._size)
        if self._reader is not None:
            heads = represented(heads, self._reader.read(heads))
        return heads.reshape(y.shape).astype(y.dtype)


@cache
def key_rotation(size: int) -> mx.array:
    """R3, the same for all heads of this size: float32 [size,size]."""
    return mx.array(cayley.start("hadamard", size, False, np.random.default_rng(FIXED)), mx.float32)
