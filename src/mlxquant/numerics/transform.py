"""What can be done to the input of a layer without changing the layer's output: divide its channels, reorder them,
rotate them in blocks.

``x' = ((x / divisor)[order]) R`` and ``W' = (W diag(divisor))[:, order] R`` with R block-diagonal and orthogonal give
``x' W'^T = x W^T``. Methods of the kind "transform" propose such changes; whoever applies them folds what can be folded
into what writes the tensor, and leaves the rest to the layer that reads it (``QuantizedLinear``). Arrays only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .arrays import Array
from .hadamard import rotated
from .input_ranges import InputRanges
from .moments import Moments


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in its model, as far as transforms care.

    ``after`` names the nonlinearity that wrote it. Whatever writes it can absorb a mixing of channels inside of runs of
    ``mixes`` channels (1: none), and with ``reorders`` any order of the channels.
    """

    after: str = ""
    mixes: int = 1
    reorders: bool = False


@dataclass(frozen=True)
class Transform:
    """``divisor`` float32 [in] > 0, ``order`` int [in] a permutation, ``block`` the size of the Hadamard blocks; none
    by default.
    """

    divisor: Array | None = None
    order: Array | None = None
    block: int = 1

    @property
    def nothing(self) -> bool:
        return self.divisor is None and self.order is None and self.block == 1

    def then(self, other: Transform) -> Transform:
        """This and then ``other``, as one: ``other.inputs(self.inputs(x))``. Raises ValueError when it would have to
        undo a rotation.
        """
        if self.block > 1 and not other.nothing:
            raise ValueError("what was rotated can only be divided, reordered or rotated again while the model runs")
        order = other.order if self.order is None else self.order if other.order is None else self.order[other.order]
        divisor = self.divisor
        if other.divisor is not None:
            theirs = other.divisor if self.order is None else other.divisor[np.argsort(self.order)]
            divisor = theirs if divisor is None else divisor * theirs
        return Transform(divisor, order, max(self.block, other.block))

    def inputs(self, x: Array) -> Array:
        """x [...,in] as the layer will see it."""
        if self.divisor is not None:
            x = x / self.divisor
        if self.order is not None:
            x = x[..., self.order]
        return rotated(x, self.block)

    def weight(self, weight: Array) -> Array:
        """A weight [out,in] to match."""
        if self.divisor is not None:
            weight = weight * self.divisor
        if self.order is not None:
            weight = weight[:, self.order]
        return rotated(weight, self.block)

    def costs(self, costs: Array) -> Array:
        """What errors of channels cost [...,n] when those are written transformed, from what errors of the channels
        themselves do.

        An error of x' is one of ``x = (x' Rᵀ)[order back] divisor``; where channels are mixed that of one costs the
        mean of its block, errors of different channels being taken as independent, as in ``sensitivity``.
        """
        if self.divisor is not None:
            costs = costs * np.square(self.divisor)
        if self.order is not None:
            costs = costs[..., self.order]
        if self.block == 1:
            return costs
        means = costs.reshape(*costs.shape[:-1], -1, self.block).mean(-1)
        return np.repeat(means, self.block, axis=-1)

    def slopes(self, slopes: Array) -> Array:
        """Gradients [...,n] of channels that are written transformed, from those of the channels themselves."""
        if self.divisor is not None:
            slopes = slopes * self.divisor
        if self.order is not None:
            slopes = slopes[..., self.order]
        return rotated(slopes, self.block)

    def moments(self, moments: Moments) -> Moments:
        """The moments of transformed inputs."""
        if self.divisor is not None:
            moments = moments.divided(self.divisor)
        if self.order is None and self.block == 1:
            return moments
        return moments.mapped(lambda rows: replace(self, divisor=None).inputs(rows))

    def ranges(self, ranges: InputRanges) -> InputRanges:
        """The ranges of transformed inputs; where channels are mixed, as far as the sampled rows tell."""
        rows = self.inputs(ranges.rows).astype(np.float32)
        if self.block > 1:
            low, high = rows.min(1), rows.max(1)
            return replace(ranges, low=low, high=high, least=low, most=high, rows=rows)
        moved = {
            name: self.inputs(getattr(ranges, name)).astype(np.float32) for name in ("low", "high", "least", "most")
        }
        return replace(ranges, rows=rows, **moved)


@dataclass(frozen=True)
class Parts:
    """Transforms of parts of what a layer reads, one after the other; channels that none of them is about stay as they
    are. ``slice(None)`` is all of it.
    """

    parts: tuple[tuple[slice, Transform], ...] = ()

    def then(self, part: slice, transform: Transform) -> Parts:
        """These, and then that."""
        return Parts((*self.parts, (part, transform)))

    def weight(self, weight: Array) -> Array:
        """A weight [out,in] to match."""
        for part, transform in self.parts:
            if part == slice(None):
                weight = transform.weight(weight)
            else:
                weight = weight.copy()
                weight[:, part] = transform.weight(weight[:, part])
        return weight

    def ranges(self, ranges: InputRanges) -> InputRanges:
        """The ranges of transformed inputs."""
        for part, transform in self.parts:
            if part == slice(None):
                ranges = transform.ranges(ranges)
            else:
                ranges = ranges.with_part(part, transform.ranges(ranges.part(part)))
        return ranges

    def online(self, width: int) -> Transform:
        """As one transform of all ``width`` channels, for a layer that does it while it runs. Raises ValueError where a
        part is put in order or rotated by itself: no layer does that.
        """
        whole = Transform()
        for part, transform in self.parts:
            if part != slice(None) and not transform.nothing:
                if transform.order is not None or transform.block > 1 or transform.divisor is None:
                    raise ValueError("no layer rotates or reorders a part of its input while it runs")
                divisor = np.ones(width, transform.divisor.dtype)
                divisor[part] = transform.divisor
                transform = Transform(divisor)
            whole = whole.then(transform)
        return whole
