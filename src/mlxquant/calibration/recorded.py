"""Calibration data of a recorded module: its calls, one a batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.adapter import Adapter
from ..models.recorded.adapter import RecordedAdapter
from ..progress import Progress, silent
from .objectives import EveryNumber
from .on_demand import OnDemand
from .probes import Probes, shares


@dataclass(frozen=True)
class RecordedCalibration:
    """The calls that a ``RecordedAdapter`` was made of."""

    adapter: RecordedAdapter

    @property
    def model(self) -> str:
        """What the module's class is called."""
        return self.adapter.name

    @property
    def source(self) -> str:
        """What was recorded, which the weights and all inputs decided."""
        return str(self.record["digest"])

    @property
    def record(self) -> dict[str, Any]:
        """All that it depends on, as plain data."""
        return {"model": self.model, **self.adapter.seen.record, "levels": len(set(self.adapter.sigmas))}

    @property
    def sides(self) -> int:
        """A call is a row: nobody says which calls belong together."""
        return 1

    @property
    def level_samples(self) -> int:
        """The most calls at one noise level."""
        return max(Counter(self.adapter.sigmas).values())

    def batches(self, adapter: Adapter, size: int | None = None) -> tuple[list[float], OnDemand]:
        """The noise level of each call, and what enters the chain for it."""
        return self.adapter.sigmas, OnDemand(self.adapter.state, range(len(self.adapter.seen)))

    def probes(self, adapter: Adapter, held_out: bool = False) -> Probes:
        """See ``CalibrationData``: every number of the result counts."""
        some = shares(len(self.adapter.seen))[held_out]
        states = OnDemand(self.adapter.state, range(len(self.adapter.seen))).some(some)
        sigmas = [self.adapter.sigmas[index] for index in some]
        return Probes(sigmas, states, [(True,)] * len(some), 1, EveryNumber())

    def judged(self, count: int) -> range:
        """All calls."""
        return range(count)

    def renewed(self, adapter: Adapter, progress: Progress = silent, folder: Path | None = None) -> RecordedCalibration:
        """The same: nobody knows how to make other calls."""
        return self
