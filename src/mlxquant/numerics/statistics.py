"""What a layer's inputs look like: second moments, ranges over time, and a few sampled rows. Bounded memory however long the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import NumericsError
from .arrays import Array
from .moments import Moments

Change = Callable[[Array], Array]
HELD_OUT = 4  # one sample in so many


def _as_it_is(x: Array) -> Array:
    return x


@dataclass(frozen=True)
class InputRanges:
    """Ranges of a layer's input [.., in], one row a noise level (sigma ascending).

    ``low`` and ``high`` [T,in]: mean over samples of each sample's minimum and maximum (averaged min-max, arXiv 2411.14172);
    ``least`` and ``most`` [T,in]: the extremes; ``rows`` [T,R,in]: sampled input rows, float32.
    """

    sigma: Array
    low: Array
    high: Array
    least: Array
    most: Array
    rows: Array

    @classmethod
    def of(cls, levels: Mapping[float, RunningRanges]) -> InputRanges:
        """What was collected at each noise level; as many rows of each as the poorest has."""
        order = sorted(levels)
        at = [levels[sigma] for sigma in order]
        count = min(len(level.rows) for level in at)
        return cls(
            np.array(order, np.float32),
            np.stack([level.low for level in at]),
            np.stack([level.high for level in at]),
            np.stack([level.least for level in at]),
            np.stack([level.most for level in at]),
            np.stack([level.rows[:count] for level in at]),
        )

    def merged(self) -> InputRanges:
        """One row for all noise levels: means of the means, extremes of the extremes, all sampled rows."""
        return InputRanges(
            self.sigma[-1:],
            self.low.mean(0, keepdims=True),
            self.high.mean(0, keepdims=True),
            self.least.min(0, keepdims=True),
            self.most.max(0, keepdims=True),
            self.rows.reshape(1, -1, self.rows.shape[-1]),
        )


class RunningRanges:
    """Ranges of a layer's input at one noise level, a few samples at a time."""

    def __init__(self, width: int):
        self._low, self._high = np.zeros(width, np.float64), np.zeros(width, np.float64)
        self.least, self.most = np.full(width, np.inf, np.float32), np.full(width, -np.inf, np.float32)
        self._samples, self._rows = 0, list[Array]()

    def add(self, low: Array, high: Array, rows: Array) -> None:
        """Each sample's minimum and maximum [B,in] over its tokens, and input rows [R,in] to keep."""
        self._low += low.sum(0)
        self._high += high.sum(0)
        self.least, self.most = np.minimum(self.least, low.min(0)), np.maximum(self.most, high.max(0))
        self._samples += len(low)
        self._rows.append(rows)

    @property
    def low(self) -> Array:
        return (self._low / self._samples).astype(np.float32)

    @property
    def high(self) -> Array:
        return (self._high / self._samples).astype(np.float32)

    @property
    def rows(self) -> Array:
        return np.concatenate(self._rows)


class InputStatistics:
    """Accumulates one layer's inputs; call ``add`` for each forward pass."""

    def __init__(self, width: int, rows: int = 64, ranges: bool = True, change: Change = _as_it_is, hold_out: bool = False):
        """Inputs go through ``change`` first. With ``hold_out`` the moments have every fourth sample of a noise level apart as well."""
        self.moments = Moments.empty(width)
        self._rows, self._wants_ranges, self._change = rows, ranges, change
        self._hold_out, self._samples = hold_out, Counter[float]()
        self._levels: dict[float, RunningRanges] = {}
        self._ranges: InputRanges | None = None

    def add(self, x: mx.array, sigma: float, exact: mx.array | None = None, weight: float = 1.0) -> None:
        """x [B,...,in], all samples at one noise level, and what the full-precision model has there, where it is known.

        ``weight`` is how much an error on these tokens counts in the moments. Raises NumericsError when it is not finite.
        """
        values = self._change(np.asarray(x.astype(mx.float32)).reshape(x.shape[0], -1, x.shape[-1]))
        reference = None if exact is None else self._change(np.asarray(exact.astype(mx.float32)).reshape(values.shape))
        for some, held_out in self._shares(sigma, len(values)):
            self.moments.add(values[some], None if reference is None else reference[some], weight, held_out)
        if self._wants_ranges:
            level = self._levels.setdefault(float(np.float32(sigma)), RunningRanges(values.shape[-1]))
            flat = values.reshape(-1, values.shape[-1])
            rows = flat[np.linspace(0, len(flat) - 1, min(self._rows, len(flat))).astype(int)]
            level.add(values.min(1), values.max(1), rows)
            self._ranges = None

    def _shares(self, sigma: float, count: int) -> list[tuple[Any, bool]]:
        """Which of the next ``count`` samples of a noise level are held out and which are not: the same ones at every noise level, so
        that where those have the same prompts in the same order, no prompt is in both shares.
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
    """Finds out, while a model runs, which layers are given the same array (q, k and v). The first of them leads the others."""

    def __init__(self) -> None:
        self.leader: dict[str, str] = {}  # in the order in which the layers ran first
        self._last: tuple[str, mx.array] | None = None

    def __getitem__(self, path: str) -> str:
        """A layer's leader; raises NumericsError for a layer that no forward pass reached."""
        if path not in self.leader:
            raise NumericsError(f"layer {path} was never reached during calibration; exclude it with a rule '{path}=keep'")
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
    """An observer for ``rewrite.tapped``. Layers that are given the same array (q, k and v) share one set of statistics."""

    def __init__(
        self,
        ranges: bool = True,
        weight: Callable[[str, float], float] = lambda path, sigma: 1.0,
        change: Mapping[str, Change] = MappingProxyType({}),
        hold_out: bool = False,
    ):
        """``weight`` says how much an error in the output of the layer at a path counts at a noise level, ``change`` what the layer will
        do to its input [...,in] before anything else. ``hold_out`` as for ``InputStatistics``.
        """
        self.sigma = 0.0
        self.exact: dict[str, mx.array] = {}  # by path, what the full-precision model has in the same place
        self._ranges, self._weight, self._change, self._hold_out = ranges, weight, change, hold_out
        self._by_path: dict[str, InputStatistics] = {}
        self._sharing = Sharing()

    def __call__(self, path: str, x: mx.array) -> None:
        if self._sharing.leads(path, x):
            if path not in self._by_path:
                change = self._change.get(path, _as_it_is)
                self._by_path[path] = InputStatistics(x.shape[-1], ranges=self._ranges, change=change, hold_out=self._hold_out)
            self._by_path[path].add(x, self.sigma, self.exact.get(path), self._weight(path, self.sigma))

    def __getitem__(self, path: str) -> InputStatistics:
        """Raises NumericsError for a layer that no forward pass reached."""
        return self._by_path[self._sharing[path]]


class MovingCentre:
    """The centre of each channel as TaQ-DiT's shift follows it: ``s <- m s + (1 - m) (min + max) / 2``, once a sample.

    TaQ-DiT (arXiv 2411.14172) starts at the first sample; with m = 0.95 and the handful of samples that calibration affords, it also
    ends there. Here s starts at 0 and is divided by ``1 - m^k`` after k samples (as in Adam, arXiv 1412.6980, section 3): a weighted
    mean with nearly equal weights for few samples, the same moving average for many.
    """

    def __init__(self, width: int, momentum: float):
        self._sum, self._weight, self._momentum = np.zeros(width, np.float64), 0.0, momentum

    def add(self, low: Array, high: Array) -> None:
        """Minima and maxima [B,in] of samples, in order."""
        for centre in (low.astype(np.float64) + high) / 2:
            self._sum = self._momentum * self._sum + (1 - self._momentum) * centre
            self._weight = self._momentum * self._weight + (1 - self._momentum)

    @property
    def value(self) -> Array:
        """[in] float32."""
        return (self._sum / self._weight).astype(np.float32)


@dataclass(frozen=True)
class Picks:
    """Which input rows to keep of a run of samples: row r is sample ``sample[r]`` (ascending), ``place[r]`` in [0,1) into its tokens."""

    sample: Array
    place: Array

    @classmethod
    def draw(cls, rows: int, samples: int, seed: Sequence[int]) -> Picks:
        """Each sample gives as many rows as any other, to within one, and each of ``rows`` stretches of the tokens gives one."""
        rng = np.random.default_rng(seed)
        return cls(np.arange(rows) * samples // rows, (rng.permutation(rows) + rng.random(rows)) / rows)

    def among(self, first: int, samples: int, tokens: int) -> tuple[mx.array, mx.array]:
        """Indices of the rows that are in a batch of ``samples`` with ``tokens`` each, of which the first is sample ``first``."""
        here = (self.sample >= first) & (self.sample < first + samples)
        token = np.minimum((self.place[here] * tokens).astype(np.int32), tokens - 1)
        return mx.array((self.sample[here] - first).astype(np.int32)), mx.array(token)


class StepInputs:
    """One layer's inputs at one timestep."""

    def __init__(self, width: int, momentum: float):
        self.ranges, self.centre = RunningRanges(width), MovingCentre(width, momentum)


class StepCollector:
    """An observer for ``rewrite.tapped`` at one timestep, in little memory: what it sees stays lazy until ``add``, which evaluates a
    whole forward pass at once and keeps minima, maxima and a few rows of it.
    """

    def __init__(self, picks: Picks, momentum: float):
        self.layers: dict[str, StepInputs] = {}  # by leader
        self._picks, self._momentum, self._samples = picks, momentum, 0
        self._sharing = Sharing()
        self._pending: dict[str, tuple[mx.array, ...]] = {}

    @property
    def leader(self) -> dict[str, str]:
        """Every layer that was reached, and the layer whose entry in ``layers`` is its own."""
        return self._sharing.leader

    def __call__(self, path: str, x: mx.array) -> None:
        """x [B,...,in], the samples that follow those added before."""
        if self._sharing.leads(path, x):
            x = x.reshape(x.shape[0], -1, x.shape[-1])
            rows = x[self._picks.among(self._samples, x.shape[0], x.shape[1])]
            self._pending[path] = (x.min(1), x.max(1), rows, mx.isfinite(x).all())

    def before(self, state: dict[str, mx.array]) -> dict[str, mx.array]:
        """The same arrays, computed only after what was seen so far: inputs are then freed in time, not all kept to the end."""
        seen = [value for values in self._pending.values() for value in values]
        return dict(zip(state, mx.depends(list(state.values()), seen), strict=True)) if seen else state

    def add(self) -> None:
        """Count the forward pass that was seen; raises NumericsError, naming the layer, when an input is not finite."""
        mx.eval(self._pending)
        for path, (low, high, rows, finite) in self._pending.items():
            if not finite.item():
                raise NumericsError(f"the input of layer {path} holds NaN or infinite values")
            inputs = self.layers.setdefault(path, StepInputs(low.shape[1], self._momentum))
            minima, maxima, kept = (np.array(value.astype(mx.float32)) for value in (low, high, rows))
            inputs.ranges.add(minima, maxima, kept)
            inputs.centre.add(minima, maxima)
        self._samples += next(iter(self._pending.values()))[0].shape[0] if self._pending else 0
        self._pending = {}
