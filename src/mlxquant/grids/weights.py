"""Integer grids: which numbers a quantized weight can be, and how its codes are stored.

A weight [out, in] is ``scale * code + bias`` with unsigned codes of ``bits`` bits, which is MLX's affine layout. A
symmetric grid has ``bias = -2^(bits-1) * scale`` and does not store it. Scales have the 11 significant bits of a
float16, whatever their magnitude, and are snapped before anything is rounded on them, so what is optimised is what is
stored: a weight times a power of two has the same codes. They are stored as float16 where its range holds all of a
layer's, from 2^-14 to 65504, and as float32 elsewhere: a step below 2^-14 would lose digits, and a row of small weights
with it. A format for tools that run bfloat16 (``-bf16``) gives scales and biases the 8 significant bits of that, which
float16 and float32 hold just as well: such a tool then reads the very numbers that codes were rounded on. Everything
here is NumPy in, NumPy out; rounding methods live in ``methods``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..errors import NumericsError, RecipeError
from ..files import schema
from ..numerics.arrays import Array

GROUPS = (32, 64, 128)
DIGITS = 11  # significant bits of a float16
COARSE, COARSE_DIGITS = "-bf16", 8  # those of a bfloat16, and how a format is called that has them
SMALLEST_HALF = float(np.finfo(np.float16).tiny)  # with all of them: 2^-14
LEAST_EXPONENT = -24  # of what float16 tells apart
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # 2^-126, and bfloat16's
COARSE_EXPONENT = -133  # of what bfloat16 tells apart
FORMAT = schema.entries(  # what ``WeightFormat.to_dict`` gives
    {"bits": schema.whole(2, 8), "group": schema.one_of("tensor", "channel", *GROUPS), "symmetric": schema.flag},
    {"digits": schema.one_of(DIGITS, COARSE_DIGITS)},
)


@dataclass(frozen=True)
class WeightFormat:
    """``bits`` 2 to 8; ``group`` is "tensor", "channel" (one scale an output row) or 32, 64, 128 input columns;
    ``digits`` are the significant bits of scales and biases: 11 as a float16, or 8 as a bfloat16.
    """

    bits: int = 4
    group: int | Literal["tensor", "channel"] = "channel"
    symmetric: bool = True
    digits: int = DIGITS

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"weight format: bits must be 2 to 8, found {self.bits}")
        if self.group not in ("tensor", "channel", *GROUPS):
            raise RecipeError(
                f"weight format: group must be 'tensor', 'channel' or one of {GROUPS}, found {self.group!r}"
            )
        if self.digits not in (DIGITS, COARSE_DIGITS):
            raise RecipeError(
                f"weight format: scales have {DIGITS} significant bits, as a float16, or {COARSE_DIGITS}, as a"
                f" bfloat16, found {self.digits!r}"
            )

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def zero_code(self) -> int:
        """The code that means zero on a symmetric grid."""
        return 2 ** (self.bits - 1)

    def columns(self, width: int) -> int:
        """How many input columns share a scale in a weight of this width; raises RecipeError when groups do not fit."""
        if not isinstance(self.group, int):
            return width
        if width % self.group:
            raise RecipeError(
                f"groups of {self.group} do not divide an input width of {width}; use 'channel' or a smaller group"
            )
        return self.group

    @property
    def coarse(self) -> WeightFormat:
        """The same with scales and biases that bfloat16 holds."""
        return replace(self, digits=COARSE_DIGITS)

    def to_dict(self) -> dict[str, Any]:
        """Digits alone where they are not a float16's: older releases read the rest."""
        digits = {} if self.digits == DIGITS else {"digits": self.digits}
        return {"bits": self.bits, "group": self.group, "symmetric": self.symmetric, **digits}

    def __str__(self) -> str:
        suffix = {"tensor": "-tensor", "channel": ""}.get(str(self.group), f"-g{self.group}")
        usual = not isinstance(self.group, int)  # groups are asymmetric unless they say otherwise
        sign = "" if self.symmetric == usual else "-sym" if self.symmetric else "-asym"
        return f"w{self.bits}{suffix}{sign}{COARSE if self.digits == COARSE_DIGITS else ''}"

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """``w4`` (symmetric per channel), ``w4-g128`` (asymmetric groups), ``w4-g64-sym``, ``w4-asym``, ``w8-tensor``;
        each with ``-bf16`` behind it where scales are to be a bfloat16's.
        """
        match = re.fullmatch(rf"w([2-8])(-tensor|-g(?:32|64|128))?(-sym|-asym)?({COARSE})?", text)
        if match is None:
            raise RecipeError(
                f"{text!r} is no weight format; expected w2 to w8, optionally -tensor or -g32/64/128, then -sym or"
                f" -asym, then {COARSE}"
            )
        where, sign = match[2] or "", match[3] or ""
        group: Any = int(where[2:]) if where.startswith("-g") else "tensor" if where else "channel"
        symmetric = sign == "-sym" if sign else not isinstance(group, int)
        return cls(int(match[1]), group, symmetric, COARSE_DIGITS if match[4] else DIGITS)


@dataclass(frozen=True)
class Grid:
    """A format with its scales fixed: ``scales`` and ``biases`` as ``snap`` and ``snap_biases`` make them, float32
    [out, groups].
    """

    format: WeightFormat
    scales: Array
    biases: Array

    @classmethod
    def symmetric(cls, format: WeightFormat, scales: Array) -> Grid:
        scales = snap(scales, format)
        return cls(format, scales, -format.zero_code * scales)

    @property
    def dtype(self) -> type[np.float16] | type[np.float32]:
        """What its scales, and such biases as are stored, have to be stored as: float16 where that loses nothing."""
        stored = (self.scales,) if self.format.symmetric else (self.scales, self.biases)
        with np.errstate(over="ignore"):
            exact = all(np.array_equal(values.astype(np.float16), values) for values in stored)
        return np.float16 if exact and (self.scales >= SMALLEST_HALF).all() else np.float32

    def expand(self, values: Array, width: int) -> Array:
        """Scales or biases [out, groups] to [out, in] or [out, 1], whichever broadcasts against a weight of
        this width.
        """
        return values if values.shape[1] == 1 else np.repeat(values, width // values.shape[1], axis=1)

    def quantize(self, weight: Array) -> Array:
        """Round to nearest: uint8 codes [out, in]."""
        scales, biases = (self.expand(v, weight.shape[1]) for v in (self.scales, self.biases))
        return np.clip(np.rint((weight - biases) / scales), 0, self.format.levels - 1).astype(np.uint8)

    def dequantize(self, codes: Array) -> Array:
        """Codes [out, in] to float32 weights."""
        scales, biases = (self.expand(v, codes.shape[1]) for v in (self.scales, self.biases))
        return (codes.astype(np.float32) * scales + biases).astype(np.float32)


def snap(scales: Array, format: WeightFormat) -> Array:
    """Scales as they will be stored: of the format's significant bits, at least float32's smallest normal number, held
    as float32; NumericsError when too large.
    """
    values = np.maximum(np.asarray(scales, np.float64), SMALLEST_SCALE)
    return _held(values, np.frexp(values)[1] - format.digits, "scale")


def snap_biases(biases: Array, scales: Array, format: WeightFormat) -> Array:
    """Biases as they will be stored beside snapped ``scales``: of the format's significant bits, held as float32. 0 is
    0.

    Beside scales of float16's range they are float16 numbers, multiples of 2^-24 where they are small: to 2^-11 of a
    step. With the digits of a bfloat16 they are bfloat16 numbers, multiples of 2^-133 where they are smaller than any
    scale. NumericsError when too large.
    """
    values = np.asarray(biases, np.float64)
    exponents = np.frexp(values)[1] - format.digits
    exponents = np.where(scales >= SMALLEST_HALF, np.maximum(exponents, LEAST_EXPONENT), exponents)
    if format.digits == COARSE_DIGITS:
        exponents = np.maximum(exponents, COARSE_EXPONENT)
    return _held(values, exponents, "bias")


def _held(values: Array, exponents: Array, what: str) -> Array:
    """The nearest multiples of ``2^exponents``, held as float32; raises NumericsError where one is no finite number."""
    with np.errstate(over="ignore", invalid="ignore"):
        held = np.ldexp(np.rint(np.ldexp(values, -exponents)), exponents).astype(np.float32)
    if not np.isfinite(held).all():
        raise NumericsError(
            f"a {what} of {np.abs(values).max():.3g} does not fit in float32; the weights are too large, leave this"
            " layer out"
        )
    return held


def grouped(weight: Array, format: WeightFormat) -> Array:
    """View a weight [out, in] as [out, groups, columns] ([1, 1, out*in] per tensor); raises NumericsError on NaN or
    infinity.
    """
    if not np.isfinite(weight).all():
        bad = int(weight.size - np.isfinite(weight).sum())
        raise NumericsError(
            f"weight of shape {weight.shape} holds {bad} NaN or infinite values; repair or re-download the checkpoint"
        )
    if format.group == "tensor":
        return weight.reshape(1, 1, -1)
    return weight.reshape(weight.shape[0], -1, format.columns(weight.shape[1]))


def fit_extremes(weight: Array, format: WeightFormat) -> Grid:
    """The grid that spans the extremes: symmetric ``absmax / (2^(bits-1) - 1)``, asymmetric ``(max - min) / (2^bits -
    1)``.

    A row (group) of zeros gets scale 1. The symmetric step follows modelopt and deepcompressor; other tools divide by
    7.5 or 8.
    """
    groups = grouped(weight, format)
    rows = weight.shape[0]
    if format.symmetric:
        peak = np.abs(groups).max(-1)
        scales = np.where(peak > 0, peak / (format.zero_code - 1), 1.0)
        return Grid.symmetric(format, np.broadcast_to(scales, (rows, scales.shape[1])))
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = snap(np.where(high > low, (high - low) / (format.levels - 1), 1.0), format)
    biases = snap_biases(low, scales, format)
    return Grid(format, *(np.ascontiguousarray(np.broadcast_to(v, (rows, v.shape[1]))) for v in (scales, biases)))
