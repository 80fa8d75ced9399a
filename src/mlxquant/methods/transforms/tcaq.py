"""Timestep-channel joint reparameterization of TCAQ-DM (arXiv 2412.16700, equations 3 to 5).

In a diffusion model the channels of an input stand out differently at different timesteps, but a division that is
folded into weights is one for all of them. TCAQ-DM weighs what each timestep would like by how large its inputs are.
Arrays only.
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
    """By what to divide each input channel, r float32 [in] with 1 <= r <= ``r_trunc``, from ``peaks`` [T,in] =
    max(|min|, |max|).

    ``r_tc = peak_tc / min_c peak_tc`` (eq. 3), ``r_c = Σ_t w_t r_tc`` with w_t the timestep's share of the peaks, which
    sum to 1 (eq. 4), truncated (eq. 5). Our departure: a channel that is dead at a timestep has nothing to say there;
    it neither is the minimum nor counts, and one that is dead throughout gets 1.
    """
    peaks = np.asarray(peaks, np.float64)
    live = peaks > 0
    least = np.where(live, peaks, np.inf).min(1, keepdims=True)
    ratios = np.where(live, peaks / least, 0.0)  # a timestep without any live channel divides by infinity
    weights = timestep_weights(peaks)[:, None] * live
    mass = weights.sum(0)
    joint = np.divide((weights * ratios).sum(0), mass, out=np.ones(peaks.shape[1]), where=mass > 0)
    return np.clip(joint, 1.0, r_trunc).astype(np.float32)


def timestep_weights(peaks: Array) -> Array:
    """Each timestep's share w [T] of the peaks [T,in]; equal shares when all are zero. They sum to 1."""
    totals = np.asarray(peaks, np.float64).sum(1)
    return totals / totals.sum() if totals.sum() > 0 else np.full(len(totals), 1 / len(totals))


@register(
    "transform",
    "tcaq",
    citation=TCAQ,
    summary="divide channels by how far they stand out, timesteps weighed by their size",
)
def tcaq(ranges: InputRanges, weights: Sequence[Array], place: Place) -> list[Transform]:
    """Divisions by the joint ratios, truncated at the paper's 10 and at 100; the weights are not looked at."""
    return [Transform(divisor=joint_ratios(timestep_peaks(ranges), truncation)) for truncation in TRUNCATIONS]
