"""What a sweep asks of calibration data, whatever it is of: batches of chain inputs at noise levels, made when they are
needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ..models.adapter import Adapter
from ..progress import Progress, silent
from .on_demand import OnDemand
from .probes import Probes


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
