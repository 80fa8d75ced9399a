"""The seam in a model's attention: modules without weights that compute softmax(q k^T / sqrt(d)) v, so that it can be
found and opened.

``QuantizedAttention`` quantizes the probabilities, a table entry a noise level. It is a simulation: the probabilities
are put on the levels of the table and multiplied as floats, whether the levels are uniform or logarithmic. Queries,
keys and values stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError
from ..files import schema
from ..grids.reading import represented
from ..grids.tables import ActivationTable
from ..grids.time import Clock
from .fast_cpu import attention, probabilities
from .names import LOG, SIGMA
from .own import Obstacle
from .quantized_input import QuantizedInput


class SoftmaxAttention(nn.Module):
    """Softmax(q k^T / sqrt(d)) v; queries, keys and values [B,heads,N,d]. A host may say the ``scale``, which is always
    1/sqrt(d).
    """

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, scale: float | None = None) -> mx.array:
        return attention(q, k, v)


class ShownAttention(SoftmaxAttention):
    """Shows its probabilities [B,heads,N,N] to an observer, not evaluated yet."""

    def __init__(self, observe: Callable[[mx.array], None]):
        super().__init__()
        self._observe = observe

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, scale: float | None = None) -> mx.array:
        p = probabilities(q, k)
        self._observe(p)
        return (p @ v.astype(p.dtype)).astype(v.dtype)


class QuantizedAttention(SoftmaxAttention, QuantizedInput):
    """``Q(P) v`` with P = softmax(q k^T / sqrt(d)) on the levels of a table with one shift an entry.

    Its parameters are those of a ``QuantizedInput``. The quantized probabilities of a row need not sum to 1, as in
    TCAQ-DM (arXiv 2412.16700).
    """

    STRUCTURE = schema.entries({"table": schema.whole(1), "log": schema.flag})

    def __init__(self, table: ActivationTable, clock: Clock):
        """Raises AdapterError when the table has a shift a channel."""
        super().__init__()
        self.set_activations(table, clock)
        self.freeze()

    def set_activations(self, table: ActivationTable, clock: Clock) -> None:
        if table.shift.shape[1] != 1:
            raise AdapterError(
                f"probabilities have one shift for all, found a table with shifts of width {table.shift.shape[1]}"
            )
        super().set_activations(table, clock)

    @property
    def facts(self) -> dict[str, Any]:
        return {"table": self[SIGMA].size, "log": LOG in self, **self._network_facts}

    @classmethod
    def blank(cls, facts: Mapping[str, Any], clock: Clock | None) -> Self:
        module = cls._bare()
        module._lay_out_input(clock, int(facts["table"]), 1, bool(facts["log"]), facts.get("network"))
        module.refresh()
        module.freeze()
        return module

    def obstacles(self) -> list[Obstacle]:
        remedy = "quantize by a recipe that leaves attention alone"
        return [Obstacle("quantized probabilities", remedy, activations=True)]

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, scale: float | None = None) -> mx.array:
        p = probabilities(q, k)
        if self.reader is not None:
            p = represented(p, self.reader.read(p))
        return (p @ v.astype(p.dtype)).astype(v.dtype)


def find_attentions(module: nn.Module) -> dict[str, SoftmaxAttention]:
    """Every attention of a module that is still exact, by path."""
    return {path: m for path, m in module.named_modules() if type(m) is SoftmaxAttention}


def find_quantized_attentions(module: nn.Module) -> dict[str, QuantizedAttention]:
    """Every attention of a module whose probabilities are quantized, by path."""
    return {path: m for path, m in module.named_modules() if isinstance(m, QuantizedAttention)}
