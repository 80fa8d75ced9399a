"""SmoothQuant (arXiv 2211.10438): move outliers of a few input channels into the weights that read them.

``(X / d) (W diag d)ᵀ = X Wᵀ``. Whoever applies d has to round the weights after it: on weights that were rounded
before, the columns of the integer weight would be multiplied and the rounding would be for another layer. Arrays only;
``sweep.folding`` does the folding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...numerics.arrays import Array
from ...numerics.input_ranges import InputRanges
from ...numerics.transform import Place, Transform
from ..registry import Citation, register

SMOOTHQUANT = Citation(
    "smoothquant",
    """@inproceedings{xiao2023smoothquant,
  title = {{SmoothQuant}: Accurate and Efficient Post-Training Quantization for Large Language Models},
  author = {Xiao, Guangxuan and Lin, Ji and Seznec, Mickael and Wu, Hao and Demouth, Julien and Han, Song},
  booktitle = {International Conference on Machine Learning},
  year = {2023},
  note = {arXiv:2211.10438}
}""",
)

SPIKE, FEW = 5.0, 0.05
BOUND = 1e4
ALPHAS = (0.15, 0.3, 0.5, 0.7, 0.85)


@register(
    "transform",
    "smoothquant",
    citation=SMOOTHQUANT,
    summary="divide channels by how much larger inputs are than weights",
)
def smoothquant(ranges: InputRanges, weights: Sequence[Array], place: Place) -> list[Transform]:
    """The ``divisor`` for a few alphas; the paper takes 0.5 for most models and searches for the others."""
    return [Transform(divisor=divisor(peaks(ranges), weights, alpha)) for alpha in ALPHAS]


def spike(channel_peaks: Array) -> tuple[float, float]:
    """How far the largest channel stands out, and how few do: p100 / p99, and the share of channels above p99.

    Over the live channels of max |x| [in] (a dead one says nothing about the others). p99 is a value that some channel
    has, the lower one where the percentile falls between two, so that a single outlier counts in full however few
    channels there are; (1, 0) when all are dead.
    """
    live = channel_peaks[channel_peaks > 0].astype(np.float64)
    if live.size == 0:
        return 1.0, 0.0
    normal = float(np.percentile(live, 99, method="lower"))
    return float(live.max() / normal), float(np.mean(live > normal))


def candidate(channel_peaks: Array) -> bool:
    """Whether few channels (under 5 %) stand far above the rest (p100 over 5 times p99), see ``spike``: there smoothing
    can pay.
    """
    ratio, share = spike(channel_peaks)
    return ratio > SPIKE and share < FEW


def divisor(channel_peaks: Array, weights: Sequence[Array], alpha: float = 0.5) -> Array:
    """``d = max|X|^alpha / max|W|^(1 - alpha)`` for each input channel: float32 [in] > 0.

    channel_peaks [in] is max |x| over all timesteps, ``weights`` the [out,in] of every layer that reads the tensor.
    alpha 1 evens out the inputs, 0 the weights' columns. d is normalised to a geometric mean of 1 over live channels,
    which changes no per-tensor or per-row step and keeps the folded producers in the range of float16, and kept within
    1e-4 to 1e4; a channel that is dead in the inputs or in the weights has nothing to trade and gets 1.
    """
    columns, peaks = column_peaks(weights).astype(np.float64), channel_peaks.astype(np.float64)
    live = (peaks > 0) & (columns > 0)
    log = alpha * np.log(np.where(live, peaks, 1)) - (1 - alpha) * np.log(np.where(live, columns, 1))
    centre = log[live].mean() if live.any() else 0.0
    return np.where(live, np.clip(np.exp(log - centre), 1 / BOUND, BOUND), 1.0).astype(np.float32)


def peaks(ranges: InputRanges) -> Array:
    """max |x| of each channel over all timesteps, [in]."""
    most: Array = timestep_peaks(ranges).max(0)
    return most


def timestep_peaks(ranges: InputRanges) -> Array:
    """max |x| of each channel at each timestep, [T,in]."""
    return np.maximum(np.abs(ranges.least), np.abs(ranges.most))


def column_peaks(weights: Sequence[Array]) -> Array:
    """max |W| of each input channel over all of some weights [out,in], [in]."""
    most: Array = np.max([np.abs(weight).max(0) for weight in weights], axis=0)
    return most
