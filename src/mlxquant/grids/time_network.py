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

from collections.abc import Callable, Mapping
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
ENDS = (FEATURES, OUTPUTS)
LARGEST, DEEPEST = 4096, 8  # units of a layer and layers: what a file may ask for

Layer = tuple[Array, Array]  # weight [in,out], bias [out]


def timestep(sigma: Array) -> Array:
    """The noise level, moved from [0, 1] to [-1, 1]: of a flow t = 1000 sigma, of other models what rises with t."""
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
class NetworkShape:
    """What a network reads and how wide its layers are: all but its numbers.

    Attributes:
        time: One of ``TIMES``.
        widths: Inputs of the first layer, then outputs of each, from FEATURES to OUTPUTS.

    Raises:
        RecipeError: The time is unknown, or the widths are none.
    """

    time: str
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.time not in list(TIMES):  # a list, since what a file says may not be hashable
            raise RecipeError(f"network over time: found another time than {sorted(TIMES)}")
        whole = all(type(width) is int and 1 <= width <= LARGEST for width in self.widths)
        if not whole or not 2 <= len(self.widths) <= DEEPEST + 1 or (self.widths[0], self.widths[-1]) != ENDS:
            raise RecipeError(
                f"network over time: its widths must be {FEATURES}, those of hidden layers of at most {LARGEST} units,"
                f" and {OUTPUTS}"
            )

    @classmethod
    def of(cls, facts: Any) -> NetworkShape:
        """The shape that ``facts`` say. Raises RecipeError where they say none."""
        if not isinstance(facts, Mapping) or not isinstance(widths := facts.get("widths"), list | tuple):
            raise RecipeError("network over time: its time and its widths are missing")
        return cls(facts.get("time", ""), tuple(widths))

    @property
    def facts(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"time": self.time, "widths": list(self.widths)}

    @property
    def size(self) -> int:
        """How many numbers a network of this shape has, Δ₀ and s₀ among them."""
        return 2 + sum((inputs + 1) * outputs for inputs, outputs in pairwise(self.widths))


@dataclass(frozen=True)
class TimeNetwork:
    """Step and shift of an input as functions of time.

    Attributes:
        time: What it reads, one of ``TIMES``.
        layers: Weights [in,out] and biases [out] float32, from FEATURES inputs to OUTPUTS outputs.
        step: Δ₀, positive.
        shift: s₀.

    Raises:
        RecipeError: The time is unknown, or the layers do not follow each other.
    """

    time: str
    layers: tuple[Layer, ...]
    step: float
    shift: float

    def __post_init__(self) -> None:
        widths = self.shape.widths
        if [(w.shape, b.shape) for w, b in self.layers] != [((i, o), (o,)) for i, o in pairwise(widths)]:
            raise RecipeError(f"network over time: its layers do not follow each other, expected widths {widths}")

    @property
    def shape(self) -> NetworkShape:
        return NetworkShape(self.time, (FEATURES, *(len(bias) for _, bias in self.layers)))

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

    @classmethod
    def of(cls, shape: NetworkShape, numbers: Array) -> TimeNetwork:
        """The network of this shape with these ``numbers``. Raises RecipeError where there are more or fewer."""
        if len(numbers) != shape.size:
            raise RecipeError(f"network over time: found {len(numbers)} numbers, expected {shape.size}")
        layers, place = [], 2
        for inputs, outputs in pairwise(shape.widths):
            middle, end = place + inputs * outputs, place + (inputs + 1) * outputs
            layers.append((numbers[place:middle].reshape(inputs, outputs), numbers[middle:end]))
            place = end
        return cls(shape.time, tuple(layers), float(numbers[0]), float(numbers[1]))
