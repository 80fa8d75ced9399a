"""What tuning is about: samples, what the full-precision model makes of them, and how far another is from that."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import CalibrationError
from ..models.stages import State
from ..numerics.arrays import Array
from ..progress import Progress, silent

Sample = Hashable
Pass = tuple[State, float | Array]  # what enters the chain, and the noise level of each row
Targets = dict[str, mx.array]


class Objective(Protocol):
    """What a model is tuned towards. Nothing of it changes while the model is tuned."""

    @property
    def held_out(self) -> Sequence[Sample]:
        """Samples that are never learned from."""
        ...

    def minibatch(self, iteration: int) -> list[Sample]:
        """The samples of an iteration: a function of the seed and the iteration alone."""
        ...

    def targets(self, samples: Sequence[Sample], progress: Progress = silent) -> Targets:
        """What the full-precision model makes of samples, for ``know``."""
        ...

    def know(self, samples: Sequence[Sample], targets: Targets) -> None:
        """Go by the targets of all samples that there will be."""
        ...

    def groups(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Samples that are run and judged together, as few as memory for a backward pass wants."""
        ...

    def passes(self, group: Sequence[Sample]) -> list[Pass]:
        """The forward passes that a group takes."""
        ...

    def loss(self, group: Sequence[Sample], predicted: list[State]) -> mx.array:
        """The loss of a group, summed over its samples.

        Args:
            group: One of ``groups``.
            predicted: What each of its passes predicts.
        """
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What there is to learn from, as plain data."""
        ...


def split(count: int, share: float, what: str) -> tuple[list[int], list[int]]:
    """Which of so many things are learned from and which are held out: the last ones.

    Raises:
        CalibrationError: There are fewer than two.
    """
    if count < 2:
        raise CalibrationError(
            f"tuned scales are judged on {what} that nothing was learned from, found {count} {what} in all; calibrate"
            " with at least 2"
        )
    held = min(max(1, round(count * share)), count - 1)
    return list(range(count - held)), list(range(count - held, count))


def draw(seed: int, iteration: int, some: Sequence[int], count: int) -> list[int]:
    """So many of some things at random, each before any comes a second time."""
    random = np.random.default_rng([seed, iteration])
    rounds = -(-count // len(some))
    order = np.concatenate([random.permutation(len(some)) for _ in range(rounds)])
    return [some[place] for place in order[:count]]


def in_parts(samples: Iterable[Sample], size: int) -> list[list[Sample]]:
    every = list(samples)
    return [every[first : first + size] for first in range(0, len(every), size)]
