"""How a running layer reads its input: where it gets the levels from, and what is left of an input that is rounded to
them.

Levels come from one of two readers. A ``TableReader`` looks them up in a static table at the time that a clock shows;
nobody passes the time to a layer, which stands somewhere deep in a host's network, so whoever starts a forward pass
sets the clock. A ``TokenReader`` takes them from the input itself, a scale for each token, where there is no time or
no calibration. Both give an ``Entry``: numbers in the shape that broadcasts against the input, so that a batch may mix
noise levels, and so that uniform, logarithmic and unquantized rows can be told apart row by row.

``represented`` then rounds without integers: it is the reference that the layers' integer arithmetic is compared with,
what simulations run on, and what learning differentiates.

A reader refuses to guess the time: a clock that is not set, or that shows another batch, is an AdapterError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..errors import AdapterError
from ..numerics.arrays import Array
from .tables import ActivationTable, mantissa_rounding
from .time import Clock


@mx.custom_function
def round_through(x: mx.array) -> Any:
    """Round to nearest, with the gradient of the identity: MLX's own rounding has none."""
    return mx.round(x)


@round_through.vjp
def _round_through_vjp(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent


@dataclass(frozen=True)
class Entry:
    """Entries of a table for a batch, shaped to broadcast against an input [B,...,in]: an entry for each row, or one.

    The flags beside the arrays say what occurs at all, so that a layer can leave out what does not without asking the
    device.

    Attributes:
        step: [1 or B, 1..., 1] float32.
        shift: [1 or B, 1..., 1 or in] float32.
        edge: 2^(bits-1): uniform codes run from -edge to edge - 1.
        is_float: Where the input stays as it is.
        log: Where the levels are logarithmic.
        half: How those are rounded, with ``kept`` and ``least``, see ``tables.mantissa_rounding``.
        limit: The largest edge in the batch.
    """

    step: mx.array
    shift: mx.array
    edge: mx.array
    is_float: mx.array
    log: mx.array
    half: mx.array
    kept: mx.array
    least: mx.array
    limit: int
    any_float: bool
    all_float: bool
    any_log: bool

    @classmethod
    def of(cls, table: ActivationTable, sigma: Array) -> Entry:
        """The entries of noise levels [B], for inputs [B,in]."""
        step, shift, bits, log = table.at(sigma)
        is_float = bits == 16
        width = np.where(is_float, 8, bits)
        edge = 2.0 ** (width - 1)
        half, kept, least = mantissa_rounding(width)
        columns = {
            "step": step,
            "edge": edge.astype(np.float32),
            "is_float": is_float,
            "log": log,
            "half": half,
            "kept": kept,
            "least": least,
        }
        return cls(
            **{name: mx.array(values[:, None]) for name, values in columns.items()},
            shift=mx.array(shift),
            limit=int(edge.max()),
            any_float=bool(is_float.any()),
            all_float=bool(is_float.all()),
            any_log=bool((log & ~is_float).any()),
        )

    def rows(self, index: mx.array) -> Entry:
        """Those of some of the noise levels: index [B] counts them."""
        return self._with(lambda values: values[index])

    def shaped(self, ndim: int) -> Entry:
        """For inputs of this many dimensions."""
        return self._with(lambda values: values.reshape(values.shape[0], *(1,) * (ndim - 2), values.shape[-1]))

    def _with(self, change: Callable[[mx.array], mx.array]) -> Entry:
        arrays: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, mx.array)
        }
        return replace(self, **arrays)


@mx.compile
def _nearest_levels(x: mx.array, half: mx.array, kept: mx.array) -> mx.array:
    """``nearest_levels`` of values from the least level to 1."""
    return mx.where(mx.isnan(x), x, ((x.view(mx.uint32) + half) & kept).view(mx.float32))


def represented(x: mx.array, entry: Entry) -> mx.array:
    """What is left of an input when its levels stand for it. Gradients go straight through the rounding; clipped values
    have none.

    Args:
        x: [B,...,in], any floating dtype.
        entry: Of its readers, shaped for it.

    Returns:
        float32, of the shape of ``x``.
    """
    x = x.astype(mx.float32)
    offset = (x - entry.shift) / entry.step
    levels = mx.clip(cast(mx.array, round_through(offset)), -entry.edge, entry.edge - 1)
    if entry.any_log:
        clipped = mx.clip(offset, entry.least, 1.0)
        # Straight through: the difference is exact, since a level and what it stands for are within a factor of 2.
        rounded = clipped + mx.stop_gradient(_nearest_levels(clipped, entry.half, entry.kept) - clipped)
        levels = mx.where(entry.log, rounded, levels)
    levels = levels * entry.step + entry.shift
    return mx.where(entry.is_float, x, levels) if entry.any_float else levels


class TokenReader:
    """Scales that follow the input: each token has its own step and shift, from its least channel to its greatest (as
    in SpinQuant, arXiv 2405.16406, appendix). There is nothing to calibrate, and no noise level.
    """

    def __init__(self, bits: int):
        """Raises RecipeError on other bits than a table may have."""
        one = np.ones(1, np.float32)
        self.bits = bits
        self._entry = Entry.of(ActivationTable(one, one, one[:, None], np.array([bits], np.uint8)), one)

    @property
    def mean_bits(self) -> float:
        return float(self.bits)

    def read(self, x: mx.array) -> Entry:
        """The entry for an input.

        Args:
            x: [...,in].

        Returns:
            With step and shift [...,1]; a token of equal channels gets step 1.
        """
        x = x.astype(mx.float32)
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        step = mx.where(high > low, (high - low) / (2**self.bits - 1), 1.0)
        shift = mx.where(high > low, low + 2 ** (self.bits - 1) * step, low)
        return replace(self._entry.shaped(x.ndim), step=step, shift=shift)


class TableReader:
    """Looks a table up at the time that a clock shows, and remembers what it looked up."""

    def __init__(self, table: ActivationTable, clock: Clock):
        self.table = table
        self._clock = clock
        self._entries: dict[tuple[bytes, int], Entry] = {}

    @property
    def sigma(self) -> Array:
        """What the clock shows, [1] or [B]."""
        return self._clock.sigma

    @property
    def mean_bits(self) -> float:
        """Averaged over noise levels."""
        return float(np.mean(self.table.bits))

    def read(self, x: mx.array) -> Entry:
        """The entry for an input at the time that the clock shows.

        Args:
            x: [B,...,in].

        Raises:
            AdapterError: The clock is not set, or shows another batch size.
        """
        sigma = self._clock.sigma
        if sigma.size not in (1, x.shape[0]):
            raise AdapterError(
                f"the clock holds {sigma.size} timesteps for a batch of {x.shape[0]}; expected 1, or one for each"
                " sample"
            )
        key = (sigma.tobytes(), x.ndim)
        if key not in self._entries:
            if len(self._entries) >= 256:  # a run with random timesteps must not grow without bound
                self._entries.clear()
            self._entries[key] = Entry.of(self.table, sigma).shaped(x.ndim)
        return self._entries[key]
