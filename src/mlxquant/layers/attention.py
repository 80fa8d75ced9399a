"""The seam in a model's attention: modules without weights that compute softmax(scale q k^T + mask) v, so that it can
be found and opened.

``QuantizedAttention`` quantizes the probabilities, a table entry a noise level. It is a simulation: the probabilities
are put on the levels of the table and multiplied as floats, whether the levels are uniform or logarithmic. Queries,
keys and values stay as they are. What a mask closes has probability 0, on the levels of a table, too.
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
from .fast_cpu import attention, opened, probabilities
from .names import LOG, SIGMA
from .own import Obstacle
from .quantized_input import QuantizedInput


class SoftmaxAttention(nn.Module):
    """Softmax(scale q k^T + mask) v: queries [B,heads,N,d], keys and values [B,heads,M,d]. Without a ``scale`` it is
    1/sqrt(d); a ``mask`` that broadcasts to [B,heads,N,M] is boolean, true where a query sees a key, or added to the
    scores, see ``fast_cpu.probabilities``.
    """

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float | None = None, mask: mx.array | None = None
    ) -> mx.array:
        return attention(q, k, v, scale, mask)


class ShownAttention(SoftmaxAttention):
    """Shows its probabilities [B,heads,N,M] to an observer, not evaluated yet, and where its mask is open, boolean of
    the mask's shape, or None without a mask.
    """

    def __init__(self, observe: Callable[[mx.array, mx.array | None], None]):
        super().__init__()
        self._observe = observe

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float | None = None, mask: mx.array | None = None
    ) -> mx.array:
        p = probabilities(q, k, scale, mask)
        self._observe(p, None if mask is None else opened(mask))
        return (p @ v.astype(p.dtype)).astype(v.dtype)


class QuantizedAttention(SoftmaxAttention, QuantizedInput):
    """``Q(P) v`` with P = softmax(scale q k^T + mask) on the levels of a table with one shift an entry, and 0 where the
    mask is closed.

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

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float | None = None, mask: mx.array | None = None
    ) -> mx.array:
        p = probabilities(q, k, scale, mask)
        if self.reader is not None:
            p = represented(p, self.reader.read(p))
            p = p if mask is None else mx.where(opened(mask), p, 0)
        return (p @ v.astype(p.dtype)).astype(v.dtype)


def find_attentions(module: nn.Module) -> dict[str, SoftmaxAttention]:
    """Every attention of a module that is still exact, by path."""
    return {path: m for path, m in module.named_modules() if type(m) is SoftmaxAttention}


def find_quantized_attentions(module: nn.Module) -> dict[str, QuantizedAttention]:
    """Every attention of a module whose probabilities are quantized, by path."""
    return {path: m for path, m in module.named_modules() if isinstance(m, QuantizedAttention)}
