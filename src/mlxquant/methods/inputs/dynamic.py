"""TCAQ-DM's dynamically adaptive quantizer: where a layer's input follows a power law, logarithmic levels; elsewhere
uniform ones.

Which of the two a noise level gets is decided once, at calibration, by which distribution explains the sampled values
better.
"""

from __future__ import annotations

import numpy as np

from ...grids.tables import ActivationTable
from ...numerics.arrays import Array
from ...numerics.input_ranges import InputRanges
from ..registry import register
from ..transforms.tcaq import TCAQ
from .clipping import error

SCALES = np.geomspace(1e-4, 30, 49)  # of the power law, in means of the values


def power_law_ratio(x: Array) -> float:
    """How much better a power law explains values x >= 0 (any shape) than its rivals do: a log-likelihood ratio, in
    nats a value.

    The power law is Lomax's, ``p(x) = (a/l) (1 + x/l)^-(a+1)``: Pareto's, counted from its least value. Its rivals are
    the normal distribution, the uniform one on [0, max x], and the exponential one, which is Lomax's with its tail
    gone. Each is fitted by maximum likelihood (l on a grid, in closed form the others) and pays ``ln(n) / 2n`` for each
    of its parameters (Schwarz 1978), so that the exponential distribution does not pass for a power law. 0 when all
    values are equal.
    """
    values = np.maximum(x.astype(np.float64).reshape(-1), 0)
    mean, size = float(values.mean()), values.size
    if values.max() == values.min():
        return 0.0
    values = values / mean
    decay = np.array([np.log1p(values / scale).mean() for scale in SCALES])  # 1 / a
    power_law = float(np.max(-np.log(decay) - np.log(SCALES) - 1 - decay))
    normal = -0.5 * (np.log(2 * np.pi * values.var()) + 1)
    one = np.log(size) / (2 * size)
    return power_law - 2 * one - float(np.max([normal - 2 * one, -1.0 - one, -np.log(values.max()) - one]))


@register(
    "range",
    "dynamic",
    citation=TCAQ,
    summary="log2 levels at the noise levels where the input follows a power law, else uniform",
)
def dynamic(ranges: InputRanges, weight: Array, bits: int, values: int = 2**12) -> ActivationTable:
    """Logarithmic entries where ``power_law_ratio`` of ``x - min x`` is positive, from the least to the largest value
    seen; elsewhere the uniform ones of ``error``. About ``values`` of each noise level's sampled entries are looked at.

    TCAQ-DM (arXiv 2412.16700, "Dynamically adaptive quantizer") decides by the sign of the likelihood ratio of a power
    law to other distributions, for groups of timesteps, on what a softmax wrote. Here every noise level is a group, a
    power law may start anywhere (a GELU writes values down to -0.17), and the rivals are named: the paper's code is not
    public. Its levels are powers of two at any width, which more than 4 bits do not make any finer; ours are (see
    ``grids.tables``).
    """
    uniform = error(ranges, weight, bits)
    low = ranges.least.min(1)
    span = ranges.most.max(1) - low
    stride = max(1, ranges.rows[0].size // values) | 1  # odd, so that it walks through all channels
    some = ranges.rows.reshape(len(low), -1)[:, ::stride] - low[:, None]
    log = np.array([power_law_ratio(x) > 0 for x in some]) & (span > 0)
    step, shift = np.where(log, span, uniform.step), np.where(log, low, uniform.shift[:, 0])
    return ActivationTable(uniform.sigma, step.astype(np.float32), shift.astype(np.float32)[:, None], uniform.bits, log)
