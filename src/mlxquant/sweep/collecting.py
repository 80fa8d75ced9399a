"""Watch layers while a stage runs: ranges and moments of each one's input, one set for layers that read the same
array.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import mlx.nn as nn
import numpy as np

from ..errors import NumericsError
from ..layers.kinds import known_kind
from ..numerics.arrays import Array
from ..numerics.input_ranges import RANGE_BATCH, InputRanges, RunningRanges
from ..numerics.layer_inputs import LayerInputs
from ..numerics.moments import Moments
from ..numerics.part_moments import PartMoments
from ..numerics.patches import spread_evenly

Change = Callable[[Array], Array]
Call = tuple[Any, ...]  # what a layer is called with: its input, and for a switch layer the indices of experts
HELD_OUT = 4  # one sample in so many


class InputStatistics:
    """Accumulates one layer's inputs; call ``add`` for each forward pass.

    There is one table for all parts of a weight. So ranges are those of any part: extremes over all, and rows sampled
    from each.
    """

    def __init__(
        self,
        layer: nn.Module,
        rows: int = 64,
        ranges: bool = True,
        change: Change | None = None,
        hold_out: bool = False,
        sides: int = 1,
        range_batch: int = RANGE_BATCH,
    ):
        """Inputs of the ``layer``, which is in full precision, go through ``change`` first. With ``hold_out`` the
        moments have every fourth sample of a noise level apart as well. A sample has ``sides`` rows, see
        ``CalibrationData.sides``, and ``range_batch`` samples are a batch of averaged min-max.
        """
        kind = known_kind(layer)
        self._layer, self._form, self._width = layer, kind.form, kind.shape(layer)[1]
        self._parts = [Moments.empty(self._width) for _ in range(kind.parts(layer))]
        self._moments = PartMoments(self._parts, kind.form.meets_one_part)
        self._looked_up: Array | None = None
        self._rows, self._wants_ranges, self._change = rows, ranges, change
        self._sides, self._range_batch = sides, range_batch
        self._hold_out, self._samples = hold_out, Counter[float]()
        self._levels: dict[float, RunningRanges] = {}
        self._ranges: InputRanges | None = None

    def add(self, call: Call, sigma: float, exact: Call | None = None, weight: float = 1.0) -> None:
        """What the layer is called with, all samples at one noise level, and with what in the full-precision model,
        where it is known.

        ``weight`` is how much an error on these tokens counts in the moments. Raises NumericsError when it is not
        finite.
        """
        inputs = self._read(call)
        if inputs.looked_up is not None:
            seen = weight * inputs.looked_up
            self._looked_up = seen if self._looked_up is None else self._looked_up + seen
            return
        reference = self._read(exact) if exact is not None and self._form.pairs_streams else None
        self._moments.share = min(self._moments.share, inputs.share)
        for some, held_out in self._shares(sigma, len(inputs.parts[0])):
            for index, moments in enumerate(self._parts):
                values = inputs.parts[index][some]
                if values.size:
                    moments.add(values, None if reference is None else reference.parts[index][some], weight, held_out)
        if self._wants_ranges and inputs.low is not None and inputs.high is not None:
            level = self._levels.setdefault(float(np.float32(sigma)), RunningRanges(self._width, self._range_batch))
            rows = inputs.rows
            sides = 1 if len(inputs.low) % self._sides else self._sides
            low, high = (v.reshape(sides, -1, self._width) for v in (inputs.low, inputs.high))
            level.add(low.min(0), high.max(0), rows[spread_evenly(len(rows), self._rows)])  # first all with a prompt
            self._ranges = None

    def _read(self, call: Call) -> LayerInputs:
        inputs = self._form.read(self._layer, *call)
        return inputs if self._change is None else LayerInputs.of_tokens(self._change(inputs.parts[0]))

    @property
    def moments(self) -> PartMoments:
        """Those of each part; where both streams were asked for and cannot be compared, they do not differ."""
        if self._looked_up is not None:
            return PartMoments.of_table(self._looked_up, self._width)
        if not self._form.pairs_streams:
            for part in self._parts:
                part.see_one_stream()
        return self._moments

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
    """Finds out, while a model runs, which layers are given the same array (q, k and v), and read the same rows of it.
    The first of them leads the others.
    """

    def __init__(self, layers: Mapping[str, nn.Module] = MappingProxyType({})) -> None:
        """``layers`` by path, in full precision; those that are not there read their input as it is."""
        self.leader: dict[str, str] = {}  # in the order in which the layers ran first
        self._layers = layers
        self._last: tuple[str, Call, Any] | None = None

    def __getitem__(self, path: str) -> str:
        """A layer's leader; raises NumericsError for a layer that no forward pass reached."""
        if path not in self.leader:
            raise NumericsError(
                f"layer {path} was never reached during calibration; exclude it with a rule '{path}=keep'"
            )
        return self.leader[path]

    def leads(self, path: str, *call: Any) -> bool:
        """Whether the layer, about to be called so, is its own leader; layers that share are called one after the
        other.
        """
        layer = self._layers.get(path)
        reads = None if layer is None else known_kind(layer).form.reads(layer)
        if path not in self.leader:
            last = self._last
            same = last is not None and last[2] == reads and _alike(last[1], call)
            self.leader[path] = last[0] if last is not None and same else path
        if self.leader[path] != path:
            return False
        self._last = (path, call, reads)
        return True


def _alike(one: Call, other: Call) -> bool:
    """Whether two calls are of the very same arrays."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


class Collector:
    """An observer for ``layers.tree.tapped``. Layers that are given the same array (q, k and v) share one set of
    statistics.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        ranges: bool = True,
        weight: Callable[[str, float], float] = lambda path, sigma: 1.0,
        change: Mapping[str, Change] = MappingProxyType({}),
        hold_out: bool = False,
        sides: int = 1,
        range_batch: int = RANGE_BATCH,
    ):
        """``layers`` by path, in full precision. ``weight`` says how much an error in the output of the layer at a path
        counts at a noise level, ``change`` what the layer will do to its input [...,in] before anything else. The rest
        as for ``InputStatistics``.
        """
        self.sigma = 0.0
        self.exact: dict[str, Call] = {}  # by path, with what the full-precision model calls the layer there
        self._layers = layers
        self._ranges, self._weight, self._change, self._hold_out = ranges, weight, change, hold_out
        self._sides, self._range_batch = sides, range_batch
        self._by_path: dict[str, InputStatistics] = {}
        self._sharing = Sharing(layers)

    def __call__(self, path: str, *call: Any) -> None:
        if self._sharing.leads(path, *call):
            if path not in self._by_path:
                self._by_path[path] = InputStatistics(
                    self._layers[path],
                    ranges=self._ranges,
                    change=self._change.get(path),
                    hold_out=self._hold_out,
                    sides=self._sides,
                    range_batch=self._range_batch,
                )
            self._by_path[path].add(call, self.sigma, self.exact.get(path), self._weight(path, self.sigma))

    def see_exact(self, path: str, *call: Any) -> None:
        """An observer of the full-precision model, before the other sees the same batch."""
        self.exact[path] = call

    def __getitem__(self, path: str) -> InputStatistics:
        """Raises NumericsError for a layer that no forward pass reached."""
        return self._by_path[self._sharing[path]]
