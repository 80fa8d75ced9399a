"""Steps as a smooth function of time without training: drawn features, and a last layer in closed form.

The network is that of ``time_networks``, but nothing of it is learned by gradient. Its hidden layer is drawn and stays
as it is, its target is the table of ``clipping.error``, softplus is inverted, and the last layer is ridge regression: a
millisecond a layer instead of seconds, and the same result each time. What Temporal Dynamic Quantization (arXiv
2306.02316) publishes is the trained one; this is our shortcut to it, and where the trained one starts.
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np

from ...grids.tables import ActivationTable
from ...grids.time_network import BIAS, FEATURES, OCTAVES, OUTPUTS, TIMES, TimeNetwork, fourier_features
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

HIDDEN = 64
RIDGE = 0.001  # in units of the mean squared hidden activation


@cache
def drawn_layer() -> tuple[Array, Array]:
    """Weights [FEATURES, HIDDEN] and biases [HIDDEN] of the hidden layer, float32, always the same.

    Each octave weighs half of the one before, so that what fits the calibrated levels is smooth between them.
    """
    rng = np.random.default_rng(0)
    octaves = 0.5 ** np.tile(np.arange(OCTAVES), 2)[:, None]
    weight, bias = rng.normal(size=(FEATURES, HIDDEN)) * octaves, rng.uniform(-1, 1, HIDDEN)
    return weight.astype(np.float32), bias.astype(np.float32)


def initial(time: str, table: ActivationTable) -> TimeNetwork:
    """The network before it is fitted: the same entry at all times, Δ₀ the geometric mean of the table's steps and s₀
    the mean of its shifts.
    """
    step, shift = np.exp(np.log(table.step.astype(np.float64)).mean()), table.shift.mean(dtype=np.float64)
    last = np.zeros((HIDDEN, OUTPUTS), np.float32), np.zeros(OUTPUTS, np.float32)
    return TimeNetwork(time, (drawn_layer(), last), float(np.float32(step)), float(np.float32(shift)))


def fitted(time: str, table: ActivationTable) -> TimeNetwork:
    """The network over ``time`` whose entries are nearest to those of a ``table`` with one shift an entry."""
    start = initial(time, table)
    wanted = np.stack(
        [inverse_softplus(table.step / start.step) - BIAS, (table.shift[:, 0] - start.shift) / start.step], axis=1
    )
    weight, bias = (part.astype(np.float64) for part in drawn_layer())
    units = np.maximum(fourier_features(TIMES[time](table.sigma)) @ weight + bias, 0)
    decay = RIDGE * float(np.square(units).mean()) * len(units)
    last = np.linalg.solve(units.T @ units + decay * np.eye(HIDDEN), units.T @ wanted)
    layers = (start.layers[0], (last.astype(np.float32), start.layers[1][1]))
    return TimeNetwork(time, layers, start.step, start.shift)


def inverse_softplus(value: Array) -> Array:
    """z with ``ln(1 + e^z) = value`` > 0."""
    value = value.astype(np.float64)
    z: Array = value + np.log(-np.expm1(-value))
    return z


ridge = partial(register, "range", citation=TDQ, over_time=True)


@ridge(
    "tdq-ridge", summary="drawn features of the timestep, ridge regression on the steps of least error (our shortcut)"
)
def tdq_ridge(ranges: InputRanges, weight: Array, bits: int) -> ActivationTable:
    """A network over the timestep, its last layer in closed form."""
    return ActivationTable.of_network(fitted("timestep", error(ranges, weight, bits)), ranges.sigma, bits)


@ridge("logsnr-ridge", summary="the same with features of the log-SNR")
def logsnr_ridge(ranges: InputRanges, weight: Array, bits: int) -> ActivationTable:
    """The same on the log-SNR λ(sigma) = 2 ln((1 - sigma) / sigma), which moves most where the image settles, near 0
    and 1.
    """
    return ActivationTable.of_network(fitted("log-snr", error(ranges, weight, bits)), ranges.sigma, bits)
