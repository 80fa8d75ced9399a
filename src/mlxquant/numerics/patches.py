"""What a convolution reads for each of its outputs, as rows of a matrix product: ``patches(x) W^T`` is what it writes.

A row has the order of a flattened kernel of MLX, [...window, in / groups], with the zeros of the padding. A transposed
convolution is an ordinary one of an input with zeros between its values, whose kernel is read backwards; so are its
patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from .arrays import Array


@dataclass(frozen=True)
class Window:
    """Where a convolution puts its kernel, a number for each of its n places.

    Attributes:
        size: Taps of the kernel.
        stride: From one output to the next.
        low: Zeros before the input. Fewer than none cut so many of its values, before zeros are put between them, as
            MLX does.
        high: Zeros behind it.
        dilation: From one tap to the next.
        spread: From one value of the input to the next, with zeros between.
        groups: Outputs of a group read the channels of that group alone.
        turned: Whether the kernel's taps are read backwards.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    dilation: tuple[int, ...]
    spread: tuple[int, ...]
    groups: int = 1
    turned: bool = False

    @classmethod
    def of(
        cls,
        size: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Window:
        """That of an ordinary convolution with MLX's options."""
        many, one = len(size), (1,) * len(size)
        edge = _each(padding, many)
        return cls(tuple(size), _each(stride, many), edge, edge, _each(dilation, many), one, groups)

    @classmethod
    def transposed(
        cls,
        size: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        output_padding: int | Sequence[int] = 0,
    ) -> Window:
        """That of a transposed convolution with MLX's options."""
        many, one = len(size), (1,) * len(size)
        dilations, edges, more = (_each(value, many) for value in (dilation, padding, output_padding))
        low = tuple(d * (n - 1) - edge for n, d, edge in zip(size, dilations, edges, strict=True))
        high = tuple(start + extra for start, extra in zip(low, more, strict=True))
        return cls(tuple(size), one, low, high, dilations, _each(stride, many), turned=True)

    def positions(self, places: Sequence[int]) -> tuple[int, ...]:
        """How many outputs there are along each place of an input [N, ...places, C]."""
        lengths = [
            (n + min(0, low) + min(0, high) - 1) * s + 1 + max(0, low) + max(0, high) - d * (size - 1)
            for n, s, low, high, d, size in zip(
                places, self.spread, self.low, self.high, self.dilation, self.size, strict=True
            )
        ]
        return tuple((length - 1) // stride + 1 for length, stride in zip(lengths, self.stride, strict=True))


def _each(value: int | Sequence[int], places: int) -> tuple[int, ...]:
    return (value,) * places if isinstance(value, int) else tuple(value)


def patches(x: mx.array, window: Window, some: Array | None = None) -> mx.array:
    """What each output of a convolution reads.

    Args:
        x: [N, ...places, C].
        window: The convolution's.
        some: Which outputs, counted over all positions, integers [S]; None for all.

    Returns:
        [N, ...positions, groups, taps * C / groups], or [N, S, groups, taps * C / groups] with ``some``; in x's dtype.
    """
    count, *places, channels = x.shape
    shape = window.positions(places)
    x = _laid_out(x, window)
    steps = [1] * x.ndim  # elements from one value to the next along each axis
    for axis in reversed(range(x.ndim - 1)):
        steps[axis] = steps[axis + 1] * x.shape[axis + 1]
    from_output = [step * stride for step, stride in zip(steps[1:-1], window.stride, strict=True)]
    from_tap = [step * dilation for step, dilation in zip(steps[1:-1], window.dilation, strict=True)]
    view = mx.as_strided(x, (count, *shape, *window.size, channels), (steps[0], *from_output, *from_tap, 1))
    if some is not None:
        chosen = tuple(mx.array(index) for index in np.unravel_index(some, shape))
        view, shape = view[(slice(None), *chosen)], (len(some),)
    if window.turned:
        view = view[(..., *(slice(None, None, -1) for _ in window.size), slice(None))]
    if window.groups == 1:
        return view.reshape(count, *shape, 1, prod(window.size) * channels)
    by_group = view.reshape(count, *shape, prod(window.size), window.groups, channels // window.groups)
    return by_group.swapaxes(-2, -3).reshape(
        count, *shape, window.groups, prod(window.size) * channels // window.groups
    )


def _laid_out(x: mx.array, window: Window) -> mx.array:
    """An input with the zeros between its values and around them, or without what is cut."""
    for axis, (spread, low, high) in enumerate(zip(window.spread, window.low, window.high, strict=True), 1):
        if low < 0 or high < 0:
            kept = slice(max(0, -low), x.shape[axis] - max(0, -high))
            x = x[tuple(kept if at == axis else slice(None) for at in range(x.ndim))]
        behind = max(0, high)
        if spread > 1 and x.shape[axis] > 1:
            length = x.shape[axis]
            x = mx.expand_dims(x, axis + 1)
            x = mx.pad(x, [(0, spread - 1 if at == axis + 1 else 0) for at in range(x.ndim)])
            x = x.reshape(*x.shape[:axis], length * spread, *x.shape[axis + 2 :])
            x = x[tuple(slice(0, (length - 1) * spread + 1) if at == axis else slice(None) for at in range(x.ndim))]
        if low > 0 or behind:
            x = mx.pad(x, [(max(0, low), behind) if at == axis else (0, 0) for at in range(x.ndim)])
    return x


def spread_evenly(count: int, most: int) -> Array:
    """At most ``most`` of ``count`` places, evenly spread from the first to the last, integers ascending."""
    return np.linspace(0, count - 1, min(most, count)).astype(int)
