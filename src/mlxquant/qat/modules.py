"""The layers that a model is trained through. They have the parameters of what they replace, under the same names and
in full precision.

Weights share a scale within an output row (an embedding's token), and the scale is the number that a layer stores;
ternary ones share one, as 2402.17764 has it. Activations share one within a tensor, or within a token, which depends on
no other token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..layers.own import OwnModule
from ..methods.fake_quantizers import Coded, Quantizer, straight_through
from .ramp import Ramp

ROW = (-1,)


@dataclass(frozen=True)
class Site:
    """Where something is rounded and when: ``place`` is a module's path, which random numbers depend on."""

    place: str
    ramp: Ramp


class QuantizingWeight(OwnModule):
    """A module with a ``weight`` [out,in] in equal parts of rows, of which each has a quantizer, or none.

    The training loop must not cast its parameters: they are rounded in float32 and only then take the input's dtype.
    """

    def __init__(self, weight: mx.array, quantizers: Sequence[Quantizer | None], site: Site):
        super().__init__()
        self.weight = weight
        self._quantizers, self._site = tuple(quantizers), site

    @property
    def quantizers(self) -> tuple[Quantizer | None, ...]:
        return self._quantizers

    def parts(self) -> list[mx.array]:
        return list(mx.split(self.weight, len(self._quantizers)))

    def coded(self, training: bool = False) -> list[Coded | None]:
        """The parts on their grids, ``training`` with the random numbers of this iteration; None for a part that is not
        quantized.
        """
        coded = []
        for number, (quantizer, part) in enumerate(zip(self._quantizers, self.parts(), strict=True)):
            key = self._site.ramp.key(f"{self._site.place}.{number}") if training else None
            coded.append(None if quantizer is None else quantizer.code(part, ROW, key, half=True))
        return coded

    def rounded(self, dtype: mx.Dtype) -> mx.array:
        """The weight as it multiplies now."""
        if not (level := self._site.ramp.level):
            return self.weight.astype(dtype)
        pairs = zip(self.parts(), self.coded(self.training), strict=True)
        rounded = [part if coded is None else straight_through(part, coded.values, level) for part, coded in pairs]
        return mx.concatenate(rounded).astype(dtype)


class QuantizingLinear(QuantizingWeight):
    """``y = x W^T + b`` with W rounded."""

    def __init__(self, linear: nn.Linear, quantizers: Sequence[Quantizer | None], site: Site):
        super().__init__(linear.weight, quantizers, site)
        if "bias" in linear:
            self.bias = linear.bias

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.rounded(x.dtype)
        return mx.addmm(self.bias.astype(x.dtype), x, weight.T) if "bias" in self else x @ weight.T


class QuantizingEmbedding(QuantizingWeight):
    """A table with its rows rounded, also where it projects to the vocabulary; ``dtype`` is that of what it
    looks up.
    """

    def __init__(self, embedding: nn.Embedding, quantizer: Quantizer, site: Site, dtype: mx.Dtype = mx.float32):
        super().__init__(embedding.weight, [quantizer], site)
        self._dtype = dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.rounded(self._dtype)[tokens]

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.rounded(x.dtype).T


class QuantizingPoint(OwnModule):
    """A seam at which the tensor is rounded. With ``keep``, what was rounded last in training stays in ``kept``."""

    def __init__(self, quantizer: Quantizer, site: Site, axes: Sequence[int] | None = None, keep: bool = False):
        super().__init__()
        self._quantizer, self._site, self._keep = quantizer, site, keep
        self._axes = None if axes is None else tuple(axes)

    @property
    def quantizer(self) -> Quantizer:
        return self._quantizer

    @property
    def kept(self) -> dict[str, mx.array]:
        """``Coded.stored`` of the last tensor that passed; empty before there was any."""
        return {name: self[f"_{name}"] for name in ("codes", "scale", "zero_point", "bits") if f"_{name}" in self}

    def restore(self, kept: dict[str, mx.array]) -> None:
        """Put back what ``kept`` was in an earlier process."""
        for name, value in kept.items():
            self[f"_{name}"] = value

    def __call__(self, x: mx.array) -> mx.array:
        if not (level := self._site.ramp.level):
            return x
        coded = self._quantizer.code(x, self._axes, self._site.ramp.key(self._site.place) if self.training else None)
        if self._keep and self.training:
            self.restore(coded.stored)
        return straight_through(x, coded.values, level)
