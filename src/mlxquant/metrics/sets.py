"""Distances between two sets of pictures: FID, KID, CMMD. One figure for a whole set, never without the number of its
pictures.

FID depends on that number: the same model scores about 20 on 5000 pictures, 28 on 2500 and 175 on 256. Figures of
different numbers of pictures do not compare, and under 2048, the width of Inception's features, a covariance has no
full rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import NumericsError
from ..numerics.arrays import Array
from .discrepancy import cmmd, kid
from .frechet import Gaussian, frechet_distance
from .images import Images

ENOUGH = 2048  # pictures a set
Batches = Images | Iterable[Images]
Encode = Callable[[Images], Array]
Measure = Callable[[Array, Array], float]


@dataclass(frozen=True)
class SetDistance:
    """A distributional figure and what it takes to read it."""

    # "fid" only with Inception's features and the published weights, otherwise "frechet_distance"; "kid", "cmmd"
    name: str
    value: float
    samples: int
    reference_samples: int
    features: str  # the network that the sets were compared through

    @property
    def warning(self) -> str | None:
        """What to say beside the figure, when there are too few pictures for it."""
        few = min(self.samples, self.reference_samples)
        if few >= ENOUGH:
            return None
        return (
            f"{self.name} from {few} pictures, under {ENOUGH}: compare it only with figures from the same pictures'"
            " prompts and number"
        )


class SetMetric:
    """Compares two sets through a network's features, which are all that is kept of the pictures."""

    def __init__(self, name: str, encode: Encode, measure: Measure, features: str):
        self.name, self.features = name, features
        self._encode, self._measure = encode, measure

    def encode(self, images: Batches) -> Array:
        """Features [N,D] of pictures [N,H,W,3] in [0,1], or of batches of them; NumericsError on none."""
        batches = [images] if isinstance(images, np.ndarray) else images
        found = [self._encode(batch) for batch in batches]
        if not found:
            raise NumericsError(f"{self.name}: a set of no pictures has no distance to another")
        return np.concatenate(found)

    def between(self, features: Array, reference: Array) -> SetDistance:
        """The distance of features [N,D] to reference features [M,D]."""
        return SetDistance(self.name, self._measure(features, reference), len(features), len(reference), self.features)

    def __call__(self, images: Batches, reference: Batches) -> SetDistance:
        """The distance of pictures to reference pictures, each an array [N,H,W,3] in [0,1] or batches of such.

        Raises NumericsError on an empty set, where one picture is too few, and on values that are not finite or not in
        [0,1].
        """
        return self.between(self.encode(images), self.encode(reference))


def frechet(encode: Encode, features: str, inception: bool) -> SetMetric:
    """FID where ``inception`` says that these are Inception's features with the published weights, a Fréchet distance
    otherwise.
    """

    def measure(x: Array, y: Array) -> float:
        return frechet_distance(Gaussian.of(x), Gaussian.of(y))

    return SetMetric("fid" if inception else "frechet_distance", encode, measure, features)


def kernel_inception(encode: Encode, features: str) -> SetMetric:
    """KID, not multiplied by 1000."""
    return SetMetric("kid", encode, kid, features)


def clip_discrepancy(encode: Encode, features: str) -> SetMetric:
    """CMMD, times 1000."""
    return SetMetric("cmmd", encode, cmmd, features)
