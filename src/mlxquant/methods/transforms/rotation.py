"""Rotations by blocks of regular Hadamard matrices: every channel of a block gets an even share of its outliers.

QuaRot (arXiv 2404.00456) rotates whole hidden states for free in language models. Behind adaLN nothing is free but the
values inside a head, so elsewhere the layer rotates while it runs, and in blocks: ``block / out`` of the work of its
matmul (ConvRot, arXiv 2512.03673, which also takes the regular matrices for their equal row sums).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...numerics.arrays import Array
from ...numerics.hadamard import block_size
from ...numerics.input_ranges import InputRanges
from ...numerics.transform import Place, Transform
from ..registry import Citation, register

QUAROT = Citation(
    "quarot",
    """@inproceedings{ashkboos2024quarot,
  title = {{QuaRot}: Outlier-Free 4-Bit Inference in Rotated {LLM}s},
  author = {Ashkboos, Saleh and Mohtashami, Amirkeivan and Croci, Maximilian L. and Li, Bo and Cameron, Pashmina
            and Jaggi, Martin and Alistarh, Dan and Hoefler, Torsten and Hensman, James},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  note = {arXiv:2404.00456}
}""",
)


@register("transform", "rotation", citation=QUAROT, summary="rotate blocks of channels by regular Hadamard matrices")
def rotation(ranges: InputRanges, weights: Sequence[Array], place: Place) -> list[Transform]:
    """The largest blocks that whatever writes the input can absorb, and the largest that divide its width; none for odd
    widths.

    Where channels may change places, also with the large ones dealt out evenly to the blocks before.
    """
    width = ranges.rows.shape[-1]
    blocks = {block_size(math.gcd(place.mixes, width)), block_size(width)} - {1}
    candidates = [Transform(block=block) for block in sorted(blocks)]
    if place.reorders:
        mass = np.abs(ranges.rows).mean((0, 1), dtype=np.float64)
        candidates += [Transform(order=dealt(mass, block), block=block) for block in sorted(blocks - {width})]
    return candidates


def dealt(mass: Array, block: int) -> Array:
    """An order [in] of channels that evens out the sum of ``mass`` [in] over blocks, from the largest channel to the
    smallest.

    Each goes to the block with the least so far that has room. What a block's largest value can be after a rotation is
    limited by the sum of magnitudes before it (PeRQ, arXiv 2601.22347, whose greedy mass diffusion this is).
    """
    count = len(mass) // block
    members: list[list[int]] = [[] for _ in range(count)]
    total = np.zeros(count)
    for channel in np.argsort(-mass, kind="stable").tolist():
        least = int(np.argmin(total))
        members[least].append(channel)
        total[least] = np.inf if len(members[least]) == block else total[least] + mass[channel]
    return np.concatenate([np.sort(part) for part in members])
