"""PTQ4DiT (arXiv 2405.16005): balance the salience of inputs and weights, at the timesteps where they disagree the
most.

A channel is easy to balance when its inputs are large where its weights are small. How far that is so changes over the
timesteps, and one division serves all of them, so those count the most at which the two go together the least.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...numerics.arrays import Array
from ...numerics.input_ranges import InputRanges
from ...numerics.transform import Place, Transform
from ..registry import Citation, register
from .smoothquant import column_peaks, divisor, timestep_peaks

PTQ4DIT = Citation(
    "ptq4dit",
    """@inproceedings{wu2024ptq4dit,
  title = {{PTQ4DiT}: Post-training Quantization for Diffusion Transformers},
  author = {Wu, Junyi and Wang, Haoxuan and Shang, Yuzhang and Shah, Mubarak and Yan, Yan},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  note = {arXiv:2405.16005}
}""",
)


@register(
    "transform",
    "ptq4dit",
    citation=PTQ4DIT,
    summary="balance inputs and weights, timesteps weighed by rank correlation",
)
def ptq4dit(ranges: InputRanges, weights: Sequence[Array], place: Place) -> list[Transform]:
    """One division by ``B = √(x̄ / w)``, x̄ = Σ_t η_t max|X_t| and w = max|W| of each channel (equations 4 to 9 of the
    paper).

    That is SmoothQuant at alpha 1/2 with x̄ for the peaks, scaled and guarded as there.
    """
    peaks = timestep_peaks(ranges)
    salient = calibrated_salience(peaks, column_peaks(weights))
    return [Transform(divisor=divisor(salient, weights, 0.5))]


def calibrated_salience(peaks: Array, columns: Array) -> Array:
    """x̄ [in] = Σ_t η_t peaks_t, η = softmax over t of minus the rank correlation of peaks_t with ``columns`` [in];
    peaks [T,in].
    """
    against = np.array([-rank_correlation(at, columns) for at in peaks])
    shares = np.exp(against - against.max())
    salience: Array = (shares / shares.sum()) @ peaks.astype(np.float64)
    return salience


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's ρ of two vectors, with mean ranks for ties; 0 when either of them is constant."""
    a, b = (ranks(values) - (len(values) - 1) / 2 for values in (a, b))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0


def ranks(values: Array) -> Array:
    """Ranks from 0, float64, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Array = (last - (counts + 1) / 2)[place]
    return mean
