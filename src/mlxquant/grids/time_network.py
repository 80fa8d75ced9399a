"""Levels as a smooth function of time: a small network from the noise level to the step and the shift of an input.

``step(sigma) = Δ₀ softplus(b + o₀)`` and ``shift(sigma) = s₀ + Δ₀ o₁``, where o is what a perceptron with ReLUs makes
of Fourier features of time, and b = ln(e - 1) makes the step Δ₀ where o is 0. That is the network of Temporal Dynamic
Quantization (arXiv 2306.02316; its last bias ln(e^Δ₀ - 1), here in units of Δ₀, so that scaling the inputs scales the
steps), with a second output, because our grids are affine and the paper's have no shift.

Time is the timestep, or the log-SNR, which moves most where the image settles, near 0 and 1. A network is evaluated
where a table is looked up, once for each noise level of a run: any schedule and any number of steps has entries of its
own, at no cost while a layer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import RecipeError
from ..numerics.arrays import Array
from .time import log_snr

OCTAVES = 6  # beyond 25 they are float noise; 10 at most make sense
FEATURES = 2 * OCTAVES
OUTPUTS = 2  # step and shift
BIAS = float(np.log(np.expm1(1)))  # softplus(BIAS) = 1
TINY = float(np.finfo(np.float32).tiny)
LARGEST = 2**16  # units of a layer: what a file may ask for

Layer = tuple[Array, Array]  # weight [in,out], bias [out]


def timestep(sigma: Array) -> Array:
    """t = 1000 sigma, moved from [0, 1000] to [-1, 1]."""
    return 2 * sigma.astype(np.float64) - 1


def signal_to_noise(sigma: Array) -> Array:
    """The log-SNR in [-10, 10] nats, divided by 10; odd around sigma = 1/2."""
    return log_snr(sigma) / 10


TIMES: dict[str, Callable[[Array], Array]] = {"timestep": timestep, "log-snr": signal_to_noise}


def fourier_features(time: Array) -> Array:
    """Sines, then cosines, of ``OCTAVES`` octaves of times [T] in [-1, 1]: [T, FEATURES] float64."""
    angle = time[:, None] * (np.pi / 2 * 2.0 ** np.arange(OCTAVES))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


@dataclass(frozen=True)
class TimeNetwork:
    """Step and shift of an input as functions of time.

    Attributes:
        time: What it reads, one of ``TIMES``.
        layers: Weights [in,out] and biases [out] float32, from FEATURES inputs to OUTPUTS outputs.
        step: Δ₀, positive.
        shift: s₀.

    Raises:
        RecipeError: The time is unknown or the layers do not follow each other.
    """

    time: str
    layers: tuple[Layer, ...]
    step: float
    shift: float

    def __post_init__(self) -> None:
        if self.time not in list(TIMES):  # a list, since what a file says may not be hashable
            raise RecipeError(f"network over time: found time {self.time!r}, expected one of {sorted(TIMES)}")
        shapes = [(weight.shape, bias.shape) for weight, bias in self.layers]
        widths = self.widths
        expected = [((a, b), (b,)) for a, b in pairwise(widths)]
        if shapes != expected or widths[0] != FEATURES or widths[-1] != OUTPUTS:
            raise RecipeError(
                f"network over time: found layers of {shapes}, expected a chain from {FEATURES} to {OUTPUTS}"
            )

    @property
    def widths(self) -> list[int]:
        """Inputs of the first layer, then outputs of each."""
        return [FEATURES, *(len(bias) for _, bias in self.layers)]

    def entries(self, sigma: Array) -> tuple[Array, Array]:
        """Step [B] and shift [B,1], float32, at noise levels [B] in any order."""
        values = fourier_features(TIMES[self.time](np.asarray(sigma)))
        for index, (weight, bias) in enumerate(self.layers):
            values = (np.maximum(values, 0) if index else values) @ weight.astype(np.float64) + bias
        step = np.maximum(self.step * np.logaddexp(0, BIAS + values[:, 0]), TINY)
        return step.astype(np.float32), (self.shift + self.step * values[:, 1:]).astype(np.float32)

    @property
    def numbers(self) -> Array:
        """All of its numbers float32 [N], for a file: Δ₀, s₀, then weight and bias of each layer."""
        parts = [part.reshape(-1) for layer in self.layers for part in layer]
        return np.concatenate([np.array([self.step, self.shift]), *parts]).astype(np.float32)

    @property
    def facts(self) -> dict[str, Any]:
        """What it takes to read ``numbers``, as plain data."""
        return {"time": self.time, "widths": self.widths}

    @classmethod
    def of(cls, facts: dict[str, Any], numbers: Array) -> TimeNetwork:
        """The network with these ``facts`` and ``numbers``. Raises RecipeError where they do not fit."""
        widths = checked_widths(facts)
        if len(numbers) != count(widths):
            raise RecipeError(f"network over time: found {len(numbers)} numbers, expected {count(widths)} for {widths}")
        layers, place = [], 2
        for inputs, outputs in pairwise(widths):
            middle, end = place + inputs * outputs, place + (inputs + 1) * outputs
            layers.append((numbers[place:middle].reshape(inputs, outputs), numbers[middle:end]))
            place = end
        return cls(facts["time"], tuple(layers), float(numbers[0]), float(numbers[1]))


def checked_widths(facts: dict[str, Any]) -> list[int]:
    """The widths of a network's layers from its ``facts``. Raises RecipeError where they are none."""
    widths = facts.get("widths") if isinstance(facts, dict) else None
    if (
        not isinstance(widths, list)
        or not 2 <= len(widths) <= 8
        or not all(type(width) is int and 1 <= width <= LARGEST for width in widths)
    ):
        raise RecipeError("network over time: its layers' widths are missing or no small whole numbers")
    return widths


def count(widths: Sequence[int]) -> int:
    """How many ``numbers`` a network with layers of these widths has."""
    return 2 + sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))
