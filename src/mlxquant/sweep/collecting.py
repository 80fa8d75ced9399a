"""Watch layers while a stage runs: ranges and moments of each one's input, one set for layers that read the same
array.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import NumericsError
from ..numerics.arrays import Array
from ..numerics.input_ranges import RANGE_BATCH, InputRanges, RunningRanges
from ..numerics.moments import Moments

Change = Callable[[Array], Array]
HELD_OUT = 4  # one sample in so many


def _as_it_is(x: Array) -> Array:
    return x


class InputStatistics:
    """Accumulates one layer's inputs; call ``add`` for each forward pass."""

    def __init__(
        self,
        width: int,
        rows: int = 64,
        ranges: bool = True,
        change: Change = _as_it_is,
        hold_out: bool = False,
        sides: int = 1,
        range_batch: int = RANGE_BATCH,
    ):
        """Inputs go through ``change`` first. With ``hold_out`` the moments have every fourth sample of a noise level
        apart as well. A sample has ``sides`` rows, see ``CalibrationData.sides``, and ``range_batch`` samples are a
        batch of averaged min-max.
        """
        self.moments = Moments.empty(width)
        self._rows, self._wants_ranges, self._change = rows, ranges, change
        self._sides, self._range_batch = sides, range_batch
        self._hold_out, self._samples = hold_out, Counter[float]()
        self._levels: dict[float, RunningRanges] = {}
        self._ranges: InputRanges | None = None

    def add(self, x: mx.array, sigma: float, exact: mx.array | None = None, weight: float = 1.0) -> None:
        """x [B,...,in], all samples at one noise level, and what the full-precision model has there, where it is known.

        ``weight`` is how much an error on these tokens counts in the moments. Raises NumericsError when it is not
        finite.
        """
        values = self._change(np.asarray(x.astype(mx.float32)).reshape(x.shape[0], -1, x.shape[-1]))
        reference = None if exact is None else self._change(np.asarray(exact.astype(mx.float32)).reshape(values.shape))
        for some, held_out in self._shares(sigma, len(values)):
            self.moments.add(values[some], None if reference is None else reference[some], weight, held_out)
        if self._wants_ranges:
            width = values.shape[-1]
            level = self._levels.setdefault(float(np.float32(sigma)), RunningRanges(width, self._range_batch))
            flat = values.reshape(-1, width)
            rows = flat[np.linspace(0, len(flat) - 1, min(self._rows, len(flat))).astype(int)]
            by_side = values.reshape(self._sides, -1, *values.shape[1:])  # first all that have their prompt
            level.add(by_side.min((0, 2)), by_side.max((0, 2)), rows)
            self._ranges = None

    def _shares(self, sigma: float, count: int) -> list[tuple[Any, bool]]:
        """Which of the next ``count`` samples of a noise level are held out and which are not: the same ones at every
        noise level, so that where those have the same prompts in the same order, no prompt is in both shares.
        """
        if not self._hold_out:
            return [(slice(None), False)]
        held = (self._samples[sigma] + np.arange(count)) % HELD_OUT == HELD_OUT - 1
        self._samples[sigma] += count
        return [(some, held_out) for some, held_out in ((~held, False), (held, True)) if some.any()]

    @property
    def ranges(self) -> InputRanges:
        """The ranges collected; raises NumericsError when there are none."""
        if self._ranges is None:
            self._ranges = self._collected()
        return self._ranges

    def _collected(self) -> InputRanges:
        if not self._levels:
            raise NumericsError("no activation ranges were collected for this layer; the calibration never reached it")
        return InputRanges.of(self._levels)


class Sharing:
    """Finds out, while a model runs, which layers are given the same array (q, k and v). The first of them leads the
    others.
    """

    def __init__(self) -> None:
        self.leader: dict[str, str] = {}  # in the order in which the layers ran first
        self._last: tuple[str, mx.array] | None = None

    def __getitem__(self, path: str) -> str:
        """A layer's leader; raises NumericsError for a layer that no forward pass reached."""
        if path not in self.leader:
            raise NumericsError(
                f"layer {path} was never reached during calibration; exclude it with a rule '{path}=keep'"
            )
        return self.leader[path]

    def leads(self, path: str, x: mx.array) -> bool:
        """Whether the layer, about to run on x, is its own leader; layers that share are called one after the other."""
        if path not in self.leader:
            self.leader[path] = self._last[0] if self._last is not None and self._last[1] is x else path
        if self.leader[path] != path:
            return False
        self._last = (path, x)
        return True


class Collector:
    """An observer for ``layers.tree.tapped``. Layers that are given the same array (q, k and v) share one set of
    statistics.
    """

    def __init__(
        self,
        ranges: bool = True,
        weight: Callable[[str, float], float] = lambda path, sigma: 1.0,
        change: Mapping[str, Change] = MappingProxyType({}),
        hold_out: bool = False,
        sides: int = 1,
        range_batch: int = RANGE_BATCH,
    ):
        """``weight`` says how much an error in the output of the layer at a path counts at a noise level, ``change``
        what the layer will do to its input [...,in] before anything else. The rest as for ``InputStatistics``.
        """
        self.sigma = 0.0
        self.exact: dict[str, mx.array] = {}  # by path, what the full-precision model has in the same place
        self._ranges, self._weight, self._change, self._hold_out = ranges, weight, change, hold_out
        self._sides, self._range_batch = sides, range_batch
        self._by_path: dict[str, InputStatistics] = {}
        self._sharing = Sharing()

    def __call__(self, path: str, x: mx.array) -> None:
        if self._sharing.leads(path, x):
            if path not in self._by_path:
                change = self._change.get(path, _as_it_is)
                self._by_path[path] = InputStatistics(
                    x.shape[-1],
                    ranges=self._ranges,
                    change=change,
                    hold_out=self._hold_out,
                    sides=self._sides,
                    range_batch=self._range_batch,
                )
            self._by_path[path].add(x, self.sigma, self.exact.get(path), self._weight(path, self.sigma))

    def __getitem__(self, path: str) -> InputStatistics:
        """Raises NumericsError for a layer that no forward pass reached."""
        return self._by_path[self._sharing[path]]
