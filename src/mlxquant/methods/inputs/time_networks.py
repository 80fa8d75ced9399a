"""Steps as a smooth function of time: Temporal Dynamic Quantization (arXiv 2306.02316), over t or over the log-SNR.

A small network for each layer maps the noise level to the layer's step, ``step(sigma) = Δ₀ softplus(b + h(e) a)``: e
are Fourier features of time, h is a hidden layer of 64 units, and b = ln(e - 1) makes the step Δ₀ where a is 0 (the
paper's last bias ln(e^Δ₀ - 1), here in units of Δ₀, so that scaling the inputs scales the steps). It is tabulated at
the calibrated noise levels and costs nothing at run time; between them the table's own rule holds, the envelope of the
neighbours.

Departures. The paper's quantizer has a step alone; it trains three hidden layers by gradient, with dropout. Our grids
are affine, so the network has a second output for the shift, linear, in units of Δ₀. Its target is the table of
``clipping.error``, softplus is inverted, and the last layer is ridge regression on one hidden layer that is drawn and
never trained: a millisecond instead of 100, and the same result each time. Three hidden layers trained by Adam towards
the same target reached it to 0.01 dB at the calibrated levels, and were 1 to 3 dB further from the best at 8 bits
between them.

What it is worth, on mmdit-shapes and held-out prompts: the error of the layers' outputs is that of ``error``, from
which it learns, to 0.02 dB over t and 0.2 dB over the log-SNR; read between the calibrated levels it is no better than
the envelope of the neighbours (A8 0.05 dB better, A4 0.2 dB worse), which is why it is not tabulated any finer.
Pictures with 4-bit inputs over the log-SNR are 0.5 dB better than those of ``error``, at 8 bits they are not.

``logsnr``, the same over the log-SNR, is no paper's. λ(sigma) is that of the rectified flow itself, and six octaves are
enough: beyond 25 they are float noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from ...grids.tables import ActivationTable
from ...grids.time import log_snr
from ...numerics.arrays import Array
from ...numerics.input_ranges import InputRanges
from ..registry import Citation, register
from .clipping import error

TDQ = Citation(
    "tdq",
    """@inproceedings{so2023tdq,
  title = {Temporal Dynamic Quantization for Diffusion Models},
  author = {So, Junhyuk and Lee, Jungwon and Ahn, Daehyun and Kim, Hyungjun and Park, Eunhyeok},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  note = {arXiv:2306.02316}
}""",
)

Time = Callable[[Array], Array]  # noise levels [T] to [-1, 1]
OCTAVES = 6  # of at most 10 that make sense
HIDDEN = 64
RIDGE = 0.001  # in units of the mean squared hidden activation
BIAS = float(np.log(np.expm1(1)))  # softplus(BIAS) = 1
TINY = float(np.finfo(np.float32).tiny)


def timestep(sigma: Array) -> Array:
    """t = 1000 sigma, moved from [0, 1000] to [-1, 1]."""
    return 2 * sigma.astype(np.float64) - 1


def signal_to_noise(sigma: Array) -> Array:
    """The log-SNR in [-10, 10] nats, divided by 10; odd around sigma = 1/2."""
    return log_snr(sigma) / 10


@cache
def drawn_layer(octaves: int, hidden: int) -> tuple[Array, Array]:
    """Weights [2 octaves, hidden] and biases [hidden] of the hidden layer, always the same.

    Each octave weighs half of the one before, so that what fits the calibrated levels is smooth between them.
    """
    rng = np.random.default_rng(0)
    return rng.normal(size=(2 * octaves, hidden)) * 0.5 ** np.tile(np.arange(octaves), 2)[:, None], rng.uniform(
        -1, 1, hidden
    )


def hidden_units(time: Array) -> Array:
    """What the last layer sees of times [T] in [-1, 1]: [T, HIDDEN] float64."""
    angle = time[:, None] * (np.pi / 2 * 2.0 ** np.arange(OCTAVES))
    weight, bias = drawn_layer(OCTAVES, HIDDEN)
    units: Array = np.maximum(np.concatenate([np.sin(angle), np.cos(angle)], axis=1) @ weight + bias, 0)
    return units


@dataclass(frozen=True)
class TimeNetwork:
    """Step and shift of a layer's input as functions of ``time``: ``last`` [HIDDEN, 2] is the last layer, ``step`` is
    Δ₀, ``shift`` the shift where ``last`` is 0, ``bits`` the input's.
    """

    time: Time
    last: Array
    step: float
    shift: float
    bits: int

    @classmethod
    def initial(cls, time: Time, table: ActivationTable) -> TimeNetwork:
        """The network before it is fitted: the same entry at all times, Δ₀ the geometric mean of the table's steps."""
        step = float(np.exp(np.log(table.step.astype(np.float64)).mean()))
        return cls(time, np.zeros((HIDDEN, 2)), step, float(table.shift.mean(dtype=np.float64)), int(table.bits[0]))

    @classmethod
    def fitted(cls, time: Time, table: ActivationTable) -> TimeNetwork:
        """The network whose entries are nearest to those of a ``table`` with shifts [T,1] and the same bits
        throughout.
        """
        start = cls.initial(time, table)
        wanted = np.stack(
            [inverse_softplus(table.step / start.step) - BIAS, (table.shift[:, 0] - start.shift) / start.step], axis=1
        )
        units = hidden_units(time(table.sigma))
        decay = RIDGE * float(np.square(units).mean()) * len(units)
        last = np.linalg.solve(units.T @ units + decay * np.eye(HIDDEN), units.T @ wanted)
        return cls(time, last, start.step, start.shift, start.bits)

    def table(self, sigma: Array) -> ActivationTable:
        """The network at noise levels [T], ascending."""
        output = hidden_units(self.time(sigma)) @ self.last
        step = np.maximum(self.step * np.logaddexp(0, BIAS + output[:, 0]), TINY).astype(np.float32)
        shift = (self.shift + self.step * output[:, 1:]).astype(np.float32)
        return ActivationTable(sigma.astype(np.float32), step, shift, np.full(len(sigma), self.bits, np.uint8))


def inverse_softplus(value: Array) -> Array:
    """z with ``ln(1 + e^z) = value`` > 0."""
    value = value.astype(np.float64)
    z: Array = value + np.log(-np.expm1(-value))
    return z


network = partial(register, "range", citation=TDQ, over_time=True)


@network("tdq", summary="a small network over the timestep, fitted to the steps of least error")
def tdq(ranges: InputRanges, weight: Array, bits: int) -> ActivationTable:
    """Temporal Dynamic Quantization (arXiv 2306.02316) on the timestep t."""
    return TimeNetwork.fitted(timestep, error(ranges, weight, bits)).table(ranges.sigma)


@network("logsnr", summary="a small network over the log-SNR, fitted to the steps of least error")
def logsnr(ranges: InputRanges, weight: Array, bits: int) -> ActivationTable:
    """The same on the log-SNR λ(sigma) = 2 ln((1 - sigma) / sigma), which moves most where the image settles, near 0
    and 1.
    """
    return TimeNetwork.fitted(signal_to_noise, error(ranges, weight, bits)).table(ranges.sigma)
