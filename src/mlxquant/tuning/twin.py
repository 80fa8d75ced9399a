"""A quantized layer whose scales can be differentiated, and the layer that the tuned ones make.

The codes stay as they are. With centred codes c, scales s and what their mid-code means, m, a weight is ``s c + m``,
and its twin has

    W = s (1 + a) c + m + s b

with a and b as many numbers as there are scales (b where the grid is asymmetric). A layer's own bias moves in units of
the norm of the weight's rows, which is how far unit inputs move an output. With a table of input levels the step of
each entry is multiplied by 1 + e: its gradient is that of learned step sizes (LSQ, arXiv 1902.08153), straight through
the rounding inside of the range. So every number that is trained is 0 at first and is relative to what it changes: one
rate serves all of them, at any scale of the weights. What a grid's numbers become is stored as in every layer.

EfficientQAT (arXiv 2407.11062) trains scales alone end to end after its blocks, and mlx-lm's distilled weights scales
and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..grids.reading import Entry, TableReader, represented, round_through
from ..grids.weights import SMALLEST_HALF, WeightFormat, snap, snap_biases
from ..layers.embeddings import QuantizedEmbedding
from ..layers.names import BIAS, BIASES, SCALES, STEP
from ..layers.product import QuantizedProduct
from ..layers.tree import StandIn
from ..numerics.arrays import Array

Numbers = dict[str, mx.array]  # what is trained, by name, 0 at first
SCALE, OFFSET, OWN_BIAS, INPUT_STEP = "scale", "offset", "bias", "step"
OFFSET_UNIT = 3.0  # an offset is in steps of the grid, of which a mistake is a third: it may move as much faster
BIAS_UNIT = 0.3
COARSE_UNIT = 2.0  # at 2 bits, where scales are further from their best
LARGEST_HALF = float(np.finfo(np.float16).max)
LEAST = 2.0**-6  # of a scale, relative to what it was: it stays positive


class Twin(StandIn):
    """In the place of a quantized layer: the same function, of numbers that may be traced.

    Args:
        layer: The layer.
        path: Where it stands.
        numbers: Of all twins, by ``name``.
        ran: Told of each call, by the path.
    """

    def __init__(self, layer: QuantizedProduct, path: str, numbers: Numbers, ran: Callable[[str], None]):
        super().__init__(layer)
        self._path, self._told = path, ran
        self._numbers = lambda what: numbers[self.name(what)]  # a module would take the dictionary for its own
        self.names = tuple(self.name(what) for what in start(layer))
        self._scales, biases = layer.scales_and_biases()
        self._middle = None if layer.format.symmetric else biases + layer.format.zero_code * self._scales
        self._units = units(layer)
        self._bias_unit = bias_unit(layer)

    def name(self, what: str) -> str:
        """Of what is trained of it."""
        return f"{self._path}/{what}"

    def matrix(self) -> mx.array:
        """The integer weight float32 [rows, in]."""
        layer = self._layer
        codes = layer.centred_codes()
        grouped = codes.reshape(codes.shape[0], self._scales.shape[1], -1)
        scales = self._scales * (1 + self._units[SCALE] * self._numbers(SCALE))
        weight = grouped * scales[..., None]
        if self._middle is not None:
            weight = weight + (self._middle + self._scales * (self._units[OFFSET] * self._numbers(OFFSET)))[..., None]
        return weight.reshape(codes.shape)

    def __call__(self, x: mx.array, *where: Any, **named: Any) -> mx.array:
        self._told(self._path)
        if isinstance(self._layer, QuantizedEmbedding):
            return self._layer.looked_up(x, self.matrix())
        return self._multiplied(x, *self._layer.arguments(*where, **named))

    def as_linear(self, x: mx.array) -> mx.array:
        """A table of embeddings as the output layer."""
        self._told(self._path)
        return self._multiplied(x)

    def _multiplied(self, x: mx.array, *call: Any) -> mx.array:
        """Float32, whatever the input's dtype: backward passes in 16 bits overflow."""
        layer = self._layer
        x = layer.transformed(x.astype(mx.float32))
        y = layer.add_branch(layer.product(self._rounded(x), self.matrix(), *call), x, *call)
        if BIAS not in layer:
            return cast(mx.array, y)
        bias = layer[BIAS].astype(mx.float32) + self._bias_unit * self._numbers(OWN_BIAS)
        return cast(mx.array, y + layer.by_output(bias.reshape(-1), *call))

    def _rounded(self, x: mx.array) -> mx.array:
        """The input on the levels of its table, straight through inside of the range."""
        reader = self._layer.reader
        if reader is None:
            return x
        entry = reader.read(mx.stop_gradient(x))
        return _through(x, self._tuned(entry, reader, x.ndim) if self.name(INPUT_STEP) in self.names else entry)

    def _tuned(self, entry: Entry, reader: TableReader, ndim: int) -> Entry:
        """An entry with its step as it is trained. Between two entries of a table, where steps are made of both, it is
        left alone.
        """
        sigma, table = reader.sigma, reader.table
        place = np.interp(sigma, table.sigma, np.arange(len(table.sigma)))
        nearest = np.rint(place).astype(int)
        own = mx.array((np.abs(place - nearest) < 1e-4).astype(np.float32))
        factor = 1 + self._units[INPUT_STEP] * own * self._numbers(INPUT_STEP)[mx.array(nearest)]
        return replace(entry, step=entry.step * factor.reshape(-1, *(1,) * (ndim - 1)))


def _through(x: mx.array, entry: Entry) -> mx.array:
    """``represented``, whose gradients end at the outermost levels, with those of all that is rounded to one of them
    without being clipped: of 16 levels two are many.
    """
    if entry.any_log:
        return represented(x, entry)
    levels = cast(mx.array, round_through((x - entry.shift) / entry.step))
    clipped = mx.clip(levels, -entry.edge, entry.edge - 1)
    kept = mx.where(clipped == levels, levels, clipped) * entry.step + entry.shift
    return mx.where(entry.is_float, x, kept) if entry.any_float else kept


def units(layer: QuantizedProduct) -> dict[str, float]:
    """How far a unit of each kind of number moves what it changes, relative to that."""
    coarse = COARSE_UNIT if layer.format.bits == 2 else 1.0
    return {SCALE: coarse, OFFSET: coarse * OFFSET_UNIT, INPUT_STEP: 1.0}


def bias_unit(layer: QuantizedProduct) -> float:
    """How far a unit moves the layer's own bias: by the mean norm of the weight's rows, less."""
    return BIAS_UNIT * float(np.array(mx.sqrt(mx.square(layer.matrix()).sum(1)).mean()))


def start(layer: QuantizedProduct) -> Numbers:
    """All that can be trained of a layer, at 0."""
    found = {SCALE: mx.zeros(layer[SCALES].shape)}
    if BIASES in layer:
        found[OFFSET] = mx.zeros(layer[BIASES].shape)
    if BIAS in layer:
        found[OWN_BIAS] = mx.zeros(layer[BIAS].shape)
    if (table := layer.table) is not None and table.network is None:
        found[INPUT_STEP] = mx.zeros(table.step.shape)
    return found


def widened(layer: QuantizedProduct, group: int | None) -> QuantizedProduct:
    """The same function with a scale and a bias for each ``group`` of columns, where the layer has a scale a row, fewer
    than 8 bits and unquantized inputs, and groups divide its width; else the layer itself.
    """
    format = layer.format
    fits = group is not None and format.group == "channel" and layer.width % group == 0
    if group is None or not fits or format.bits == 8 or layer.reader is not None:
        return layer
    grid, dtype, groups = layer.grid(), layer[SCALES].dtype, layer.width // group
    if dtype == mx.float16 and np.abs(grid.biases).max() > LARGEST_HALF:
        return layer
    values = {SCALES: grid.scales, BIASES: grid.biases}
    repeated = {name: mx.array(np.repeat(value, groups, axis=1), dtype) for name, value in values.items()}
    return layer.with_numbers(repeated, WeightFormat(format.bits, group, False, format.digits))


def tuned(layer: QuantizedProduct, path: str, numbers: Mapping[str, mx.array]) -> QuantizedProduct:
    """The layer with what was trained in the places and dtypes in which it is stored; at 0 the same layer, bit for bit.

    Args:
        layer: The layer that the twin stood for.
        path: Of the twin.
        numbers: Of all twins, by name.

    Raises:
        NumericsError: A scale or a bias is too large for float32.
    """
    format, dtype, unit = layer.format, layer[SCALES].dtype, units(layer)
    got = {what: np.array(numbers[f"{path}/{what}"]).astype(np.float64) for what in start(layer)}
    before = np.array(layer[SCALES]).astype(np.float64)
    least, most = (SMALLEST_HALF, LARGEST_HALF) if dtype == mx.float16 else (0.0, np.inf)
    wanted = np.maximum(before * (1 + unit[SCALE] * got[SCALE]), before * LEAST)
    scales = _kept(snap(np.clip(wanted, least, most), format), before, got[SCALE])
    found = {SCALES: mx.array(scales, dtype)}
    if OFFSET in got:
        biases = np.array(layer[BIASES]).astype(np.float64)
        moved = biases - format.zero_code * (scales - before) + before * (unit[OFFSET] * got[OFFSET])
        moved = np.clip(moved, -most, most)
        found[BIASES] = mx.array(_kept(snap_biases(moved, scales, format), biases, moved - biases), dtype)
    if OWN_BIAS in got:
        bias = layer[BIAS]
        moved = np.array(bias.astype(mx.float32)) + bias_unit(layer) * got[OWN_BIAS]
        found[BIAS] = mx.array(moved.astype(np.float32)).astype(bias.dtype)
    if INPUT_STEP in got:
        steps = np.array(layer[STEP]).astype(np.float64)
        moved = np.maximum(steps * (1 + unit[INPUT_STEP] * got[INPUT_STEP]), steps * LEAST)
        found[STEP] = mx.array(moved.astype(np.float32))
    return layer.with_numbers(found)


def _kept(values: Array, before: Array, moved: Array) -> Array:
    """New values, and the old ones, however they were stored, where nothing moved; float32."""
    return np.where(moved == 0, before, values).astype(np.float32)
