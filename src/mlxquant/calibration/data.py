"""What a sweep asks of calibration data, whatever it is of: batches of chain inputs at noise levels, made when they are
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

from ..models.adapter import Adapter
from ..models.stages import State
from ..progress import Progress, silent

if TYPE_CHECKING:
    from .probes import Probes


class OnDemand(Sequence[State]):
    """States that are made anew by ``make(index)`` whenever they are asked for: whoever uses one decides how long it
    lives.
    """

    def __init__(self, make: Callable[[int], State], indices: range):
        self._make, self._indices = make, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> State: ...
    @overload
    def __getitem__(self, index: slice) -> OnDemand: ...
    def __getitem__(self, index: int | slice) -> State | OnDemand:
        found = self._indices[index]
        return OnDemand(self._make, found) if isinstance(found, range) else self._make(found)

    def some(self, indices: Sequence[int]) -> OnDemand:
        """Those at these places."""
        make, chosen = self._make, [self._indices[index] for index in indices]
        return OnDemand(lambda place: make(chosen[place]), range(len(chosen)))

    def clear(self) -> None:
        """Be empty from now on, and forget what the states are made from."""
        self._make, self._indices = lambda index: {}, range(0)


class CalibrationData(Protocol):
    """What a model is calibrated with."""

    @property
    def model(self) -> str:
        """The name of the model that it was made for."""
        ...

    @property
    def source(self) -> str:
        """The fingerprint of that model's weights."""
        ...

    @property
    def record(self) -> dict[str, Any]:
        """All that it depends on, as plain data."""
        ...

    @property
    def sides(self) -> int:
        """How many rows of a batch belong to one sample: what a guided model reads of a picture with its prompt, and
        without. A batch has first one row of each sample, then the next of each in the same order. Where rows cannot
        share a batch it is 1: each row is a sample.
        """
        ...

    @property
    def level_samples(self) -> int:
        """The most samples that it has at one noise level."""
        ...

    def batches(self, adapter: Adapter, size: int | None = None) -> tuple[list[float], OnDemand]:
        """Noise levels and chain inputs, each batch at one noise level, of at most ``size`` samples."""
        ...

    def probes(self, adapter: Adapter, held_out: bool = False) -> Probes:
        """Samples to differentiate the model on, at most ``adapter.rows`` rows a batch: those to learn from, or those
        that are held out from it.
        """
        ...

    def judged(self, count: int) -> range:
        """Which of so many batches show well enough which of two ways to quantize a stage is better."""
        ...

    def renewed(self, adapter: Adapter, progress: Progress = silent, folder: Path | None = None) -> CalibrationData:
        """The same, as another model's own runs would have it, kept in ``folder`` while it is made."""
        ...
