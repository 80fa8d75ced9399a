"""Timestep-channel joint reparameterization of TCAQ-DM (arXiv 2412.16700, equations 3 to 5), and a variant of ours.

In a diffusion model the channels of an input stand out differently at different timesteps, but a division that is
folded into weights is one for all of them, so the wishes of the timesteps have to be averaged. TCAQ-DM weighs them for
each channel by how large that channel is at the timestep: ``tcaq``. Ours weighs them by how large the whole input is at
the timestep, with one weight for all channels: ``tcaq-timestep``. Arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...numerics.arrays import Array
from ...numerics.input_ranges import InputRanges
from ...numerics.transform import Place, Transform
from ..registry import Citation, register
from .smoothquant import timestep_peaks

TCAQ = Citation(
    "tcaq",
    """@article{huang2024tcaqdm,
  title = {{TCAQ-DM}: Timestep-Channel Adaptive Quantization for Diffusion Models},
  author = {Huang, Haocheng and Chen, Jiaxin and Guo, Jinyang and Zhan, Ruiyi and Wang, Yunhong},
  journal = {arXiv preprint arXiv:2412.16700},
  year = {2024}
}""",
)

R_TRUNC = 10.0
TRUNCATIONS = (R_TRUNC, R_TRUNC**2)


def joint_ratios(peaks: Array, r_trunc: float = R_TRUNC) -> Array:
    """TCAQ-DM's joint ratios: by what to divide each input channel.

    ``r_tc = peak_tc / min_c peak_tc`` (eq. 3), ``r_c = Σ_t r_tc peak_tc / Σ_t peak_tc`` (eq. 4): each channel has
    weights of its own over the timesteps. Truncated by eq. 5. Our departure: a channel that is dead at a timestep is
    not the minimum there, and one that is dead throughout gets 1.

    Args:
        peaks: [T,in], max(|min|, |max|) of each channel at each timestep, at least 0.
        r_trunc: The most that a channel is divided by, at least 1.

    Returns:
        float32 [in], from 1 to ``r_trunc``.
    """
    peaks = np.asarray(peaks, np.float64)
    return _averaged(peaks, peaks, r_trunc)


def timestep_ratios(peaks: Array, r_trunc: float = R_TRUNC) -> Array:
    """Joint ratios by our weights, one for each timestep: ``r_c = Σ_t w_t r_tc``; all else as in ``joint_ratios``.

    A channel that is dead at a timestep has nothing to say there: the weights of the others count.

    Args:
        peaks: [T,in], as ``joint_ratios`` takes them.
        r_trunc: The most that a channel is divided by, at least 1.

    Returns:
        float32 [in], from 1 to ``r_trunc``.
    """
    peaks = np.asarray(peaks, np.float64)
    return _averaged(peaks, timestep_weights(peaks)[:, None] * (peaks > 0), r_trunc)


def timestep_weights(peaks: Array) -> Array:
    """Each timestep's share w [T] of the peaks [T,in]; equal shares when all are zero. They sum to 1."""
    totals = np.asarray(peaks, np.float64).sum(1)
    return totals / totals.sum() if totals.sum() > 0 else np.full(len(totals), 1 / len(totals))


def _averaged(peaks: Array, weights: Array, r_trunc: float) -> Array:
    """The mean over timesteps of ``r_tc``, by ``weights`` [T,in], truncated."""
    live = peaks > 0
    least = np.where(live, peaks, np.inf).min(1, keepdims=True)
    ratios = np.where(live, peaks / least, 0.0)  # a timestep without any live channel divides by infinity
    mass = weights.sum(0)
    joint = np.divide((weights * ratios).sum(0), mass, out=np.ones(peaks.shape[1]), where=mass > 0)
    return np.clip(joint, 1.0, r_trunc).astype(np.float32)


@register(
    "transform",
    "tcaq",
    citation=TCAQ,
    summary="divide channels by how far they stand out, at each timestep weighed by their own size (as published)",
)
def tcaq(ranges: InputRanges, weights: Sequence[Array], place: Place) -> list[Transform]:
    """Divisions by TCAQ-DM's joint ratios, truncated at the paper's 10 and at 100; the weights are not looked at."""
    return [Transform(divisor=joint_ratios(timestep_peaks(ranges), truncation)) for truncation in TRUNCATIONS]


@register(
    "transform",
    "tcaq-timestep",
    citation=TCAQ,
    summary="the same with one weight a timestep for all channels, the input's size (our variant)",
)
def tcaq_timestep(ranges: InputRanges, weights: Sequence[Array], place: Place) -> list[Transform]:
    """Divisions by the joint ratios of our variant, truncated at 10 and at 100; the weights are not looked at."""
    return [Transform(divisor=timestep_ratios(timestep_peaks(ranges), truncation)) for truncation in TRUNCATIONS]
