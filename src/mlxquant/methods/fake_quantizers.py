"""Quantizers to train through: forward, numbers of a grid; backward, as if nothing had happened.

All follow MLX's affine layout, ``value = scale * code + bias`` with codes from 0 to 2^bits - 1, so what was trained is
what a layer stores. Gradients pass straight through (arXiv 1308.3432, section 4), everywhere: no scale here cuts off
more than rounding does, but for the ternary one, whose authors pass them, too (2402.17764). Nothing flows into the
scales: they follow the values that they are taken from.

What they refuse to do: a range always includes 0, which is then a code (else the zero point of a range without 0 would
be cut off); scales of zeros are 1, so that nothing is divided by 0; stochastic codes are clipped before they are
stored, so that 8 bits never wrap in int8; and random numbers come from the caller's key alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx

from ..errors import RecipeError
from ..grids.weights import DIGITS, SMALLEST_SCALE
from .registry import Citation, get, register

STOCHASTIC_ROUNDING = Citation(
    "stochastic-rounding",
    """@inproceedings{gupta2015limited,
  title = {Deep Learning with Limited Numerical Precision},
  author = {Gupta, Suyog and Agrawal, Ankur and Gopalakrishnan, Kailash and Narayanan, Pritish},
  booktitle = {International Conference on Machine Learning},
  year = {2015},
  note = {arXiv:1502.02551}
}""",
)

DROPPED = 24 - DIGITS  # bits of a float32 that no scale has
Axes = Sequence[int] | None


@dataclass(frozen=True)
class Coded:
    """``codes`` float32 holds integers from 0 to 2^bits - 1 in the shape of x; ``scale`` and ``bias`` float32 broadcast
    against it.
    """

    codes: mx.array
    scale: mx.array
    bias: mx.array
    bits: int

    @property
    def values(self) -> mx.array:
        return self.codes * self.scale + self.bias

    @property
    def signed(self) -> mx.array:
        """Codes int8 around the middle of the grid, which is 0 on symmetric ones."""
        return (self.codes - 2 ** (self.bits - 1)).astype(mx.int8)

    @property
    def stored(self) -> dict[str, mx.array]:
        """What a file keeps: ``codes`` int8, ``scale`` and ``zero_point`` float32, ``bits`` uint8."""
        return {
            "codes": self.signed,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "bits": mx.array(self.bits, mx.uint8),
        }

    @property
    def zero_point(self) -> mx.array:
        """The signed code that means 0, float32: ``value = scale * (signed - zero_point)``."""
        return -self.bias / self.scale - 2 ** (self.bits - 1)


class FakeQuantizer(Protocol):
    def __call__(
        self, x: mx.array, bits: int, axes: Axes = None, key: mx.array | None = None, half: bool = False
    ) -> Coded:
        """x of any shape and dtype; values that differ only in their place along ``axes`` share a scale (None: all do).

        ``half``: scales and biases have the digits of a float16, before anything is rounded on them, as layers store
        weights.
        """
        ...


@register("fake", "symmetric_quant", summary="steps of absmax / (2^(bits-1) - 1), zero in the middle")
def symmetric_quant(
    x: mx.array, bits: int, axes: Axes = None, key: mx.array | None = None, half: bool = False
) -> Coded:
    """``s = max|x| / (2^(b-1) - 1)``, round to nearest; ``key`` is not used."""
    x, scale, zero = _symmetric(x, bits, axes, half)
    return Coded(mx.clip(mx.round(x / scale), 1 - zero, zero - 1) + zero, scale, -zero * scale, bits)


@register("fake", "affine_quant", summary="steps of (max - min) / (2^bits - 1), zero wherever it falls")
def affine_quant(x: mx.array, bits: int, axes: Axes = None, key: mx.array | None = None, half: bool = False) -> Coded:
    """``s = (max - min) / (2^b - 1)`` of a range that includes 0, which gets a code of its own; ``key`` is not used.

    With ``half`` that code means 0 only to the precision of such a bias, at most 6 % of a step.
    """
    x, last = x.astype(mx.float32), 2 ** _checked(bits) - 1
    low = mx.minimum(x.min(axis=axes, keepdims=True), 0)
    high = mx.maximum(x.max(axis=axes, keepdims=True), 0)
    scale = _scale((high - low) / last, half)
    bias = -scale * mx.clip(mx.round(-low / scale), 0, last)
    bias = _snapped(bias) if half else bias
    return Coded(mx.clip(mx.round((x - bias) / scale), 0, last), scale, bias, bits)


@register(
    "fake",
    "stochastic_quant",
    citation=STOCHASTIC_ROUNDING,
    summary="symmetric steps, rounded up as often as the value is near",
)
def stochastic_quant(
    x: mx.array, bits: int, axes: Axes = None, key: mx.array | None = None, half: bool = False
) -> Coded:
    """``floor(x / s + u)`` with u uniform in [0,1) from ``key``: its mean is x / s, its variance f(1 - f), f the
    fraction of x / s.

    Without a key u is one half, which is rounding to nearest.
    """
    x, scale, zero = _symmetric(x, bits, axes, half)
    u = 0.5 if key is None else mx.random.uniform(shape=x.shape, key=key)
    return Coded(mx.clip(mx.floor(x / scale + u), 1 - zero, zero - 1) + zero, scale, -zero * scale, bits)


BITNET = Citation(
    "bitnet",
    """@article{ma2024bitnet,
  title = {The Era of 1-bit {LLM}s: All Large Language Models are in 1.58 Bits},
  author = {Ma, Shuming and Wang, Hongyu and Ma, Lingxiao and Wang, Lei and Wang, Wenhui and Huang, Shaohan
            and Dong, Li and Wang, Ruiping and Xue, Jilong and Wei, Furu},
  journal = {arXiv preprint arXiv:2402.17764},
  year = {2024}
}""",
)


@register("fake", "ternary_quant", citation=BITNET, summary="-1, 0 or 1 times the mean magnitude")
def ternary_quant(
    x: mx.array, bits: int = 2, axes: Axes = None, key: mx.array | None = None, half: bool = False
) -> Coded:
    """``s = mean|x|`` of all values, ``clip(round(x / s), -1, 1)`` (2402.17764, eq. 1 to 3): codes 1, 2 and 3 of 2
    bits.

    ``bits``, ``axes`` and ``key`` are not used: there are three values, and one scale.
    """
    x = x.astype(mx.float32)
    scale = _scale(mx.abs(x).mean(keepdims=True), half)
    return Coded(mx.clip(mx.round(x / scale), -1, 1) + 2, scale, -2 * scale, 2)


def _symmetric(x: mx.array, bits: int, axes: Axes, half: bool) -> tuple[mx.array, mx.array, int]:
    """x float32, its scale, and the code that means 0."""
    x, zero = x.astype(mx.float32), 2 ** (_checked(bits) - 1)
    return x, _scale(mx.abs(x).max(axis=axes, keepdims=True) / (zero - 1), half), zero


def _scale(step: mx.array, half: bool) -> mx.array:
    """A step as a scale that can be divided by: 1 where it is 0, and, for layers, of a float16's digits."""
    step = mx.where(step > 0, step, 1.0)
    return _snapped(mx.maximum(step, SMALLEST_SCALE)) if half else step


def _snapped(values: mx.array) -> mx.array:
    """``grids.weights.snap`` of scales or biases float32 as a part of MLX's graph: to nearest, ties to even."""
    bits = values.view(mx.uint32)
    bits = bits + (2 ** (DROPPED - 1) - 1) + ((bits >> DROPPED) & 1)
    return ((bits >> DROPPED) << DROPPED).view(mx.float32)


def _checked(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise RecipeError(f"fake quantization: bits must be 2 to 8, found {bits}")
    return bits


@dataclass(frozen=True)
class Quantizer:
    """A method by its name, and bits 2 to 8. Raises RecipeError on what does not exist."""

    method: str
    bits: int = 8

    def __post_init__(self) -> None:
        get("fake", self.method)
        _checked(self.bits)

    def code(self, x: mx.array, axes: Axes = None, key: mx.array | None = None, half: bool = False) -> Coded:
        """x on its grid, cut off from x's gradient."""
        quantize: FakeQuantizer = get("fake", self.method).function
        return quantize(mx.stop_gradient(x), self.bits, axes, key, half)


@mx.custom_function
def _pass_through(x: mx.array, values: mx.array) -> Any:
    return values


@_pass_through.vjp
def _pass_through_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> Any:
    return cotangent, mx.zeros_like(cotangent)


def straight_through(x: mx.array, values: mx.array, level: float = 1.0) -> mx.array:
    """``(1 - level) x + level values`` in x's dtype, with x's gradient; exactly ``values`` at level 1, and x at 0."""
    if level <= 0:
        return x
    values = values.astype(x.dtype)
    return cast(mx.array, _pass_through(x, values if level >= 1 else x + level * (values - x)))
