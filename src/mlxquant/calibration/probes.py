"""Calibration samples as whoever differentiates a model wants them: all rows of a sample side by side, and beside them
what predictions are judged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .objectives import Objective
from .on_demand import OnDemand

HELD_OUT = 8  # one sample in so many


@dataclass(frozen=True)
class Probes:
    """Batches of chain inputs.

    Attributes:
        sigmas: The noise level of each batch.
        states: What enters the chain, one state a batch.
        prompted: For each batch, of each of its rows whether it has its prompt; True where there is no guidance.
        sides: Rows of a sample that follow each other in a batch.
        objective: How what the model predicts for them is judged.
    """

    sigmas: Sequence[float]
    states: OnDemand
    prompted: Sequence[tuple[bool, ...]]
    sides: int
    objective: Objective

    @property
    def rows(self) -> int:
        """Of all batches."""
        return sum(map(len, self.prompted))

    def few(self, rows: int) -> Probes:
        """As many batches as have at most ``rows`` rows, at least one, evenly spread over all."""
        longest = max(map(len, self.prompted))
        count = min(len(self.sigmas), max(1, rows // longest))
        some = middles(len(self.sigmas), count)
        return replace(
            self,
            sigmas=[self.sigmas[index] for index in some],
            states=self.states.some(some),
            prompted=[self.prompted[index] for index in some],
        )


def middles(count: int, parts: int) -> list[int]:
    """The place in the middle of each of so many equal parts of ``count`` places."""
    return [(2 * part + 1) * count // (2 * parts) for part in range(parts)]


def shares(count: int) -> tuple[list[int], list[int]]:
    """Which of ``count`` samples to learn from and which to judge by: one in ``HELD_OUT`` is held out, at least one. A
    single sample is in both.
    """
    if count < 2:
        return list(range(count)), list(range(count))
    held = [sample for sample in range(count) if (count - 1 - sample) % HELD_OUT == 0]
    return [sample for sample in range(count) if sample not in held], held
