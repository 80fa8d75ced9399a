"""Seconds of a long job that may be killed: what has gone by is kept in a file every second, and a resumed job counts
on from there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..files.kept_arrays import KeptFacts
from ..files.schema import entries, number
from ..progress import Progress

KIND = "stopwatch"
INTERVAL = 1.0  # seconds between two writes


class Stopwatch:
    """Runs from its making on. ``job`` binds the file to one job; another's seconds are not counted.

    What was done between the last write and a kill is not counted either: the resumed job does it again. Raises
    ArtifactError when the file is damaged.
    """

    def __init__(self, path: Path, job: str):
        self._kept = KeptFacts(path, KIND, job)
        self._before = kept_seconds(path, job) or 0.0
        self._start = self._written = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def keep(self) -> float:
        """Write the seconds so far, and return them."""
        seconds, self._written = self.seconds, time.perf_counter()
        self._kept.save({"seconds": seconds})
        return seconds

    def watching(self, progress: Progress) -> Progress:
        """The same report of progress, which also keeps the seconds while work goes on."""

        def watched(items: Iterable[Any], label: str) -> Iterator[Any]:
            for item in progress(items, label):
                yield item
                if time.perf_counter() - self._written >= INTERVAL:
                    self.keep()

        return watched


def kept_seconds(path: Path, job: str) -> float | None:
    """What the stopwatch of this job showed last; None where there is none. Raises ArtifactError when the file is
    damaged.
    """
    found = KeptFacts(path, KIND, job).load(entries({"seconds": number(0)}))
    return None if found is None else float(found["seconds"])
