"""A picture through a function in overlapping tiles, blended as diffusers does it: memory is that of a tile."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

OVERLAP = 0.25  # of a tile's side with its neighbour


def in_tiles(function: Callable[[mx.array], mx.array], x: mx.array, tile: int, result: int) -> mx.array:
    """``function(x)`` for a function that looks at a neighbourhood of each place.

    What it sums over all places, in a normalisation or an attention, it sums over a tile: there the result is another
    than that of the whole, by little where tiles are alike.

    Args:
        function: [B,h,w,I] to [B,h',w',O], where a side ``tile`` becomes one of ``result``; it is evaluated for each
            tile.
        x: [B,H,W,I].
        tile: Side of a tile of ``x``; those at the end are smaller.
        result: Side of what the function makes of it.

    Returns:
        [B,H',W',O].
    """
    step, blend = int(tile * (1 - OVERLAP)), int(result * OVERLAP)
    kept, rows = result - blend, []
    above: list[mx.array] = []
    for top in range(0, x.shape[1], step):
        row: list[mx.array] = []
        for index, left in enumerate(range(0, x.shape[2], step)):
            piece = function(x[:, top : top + tile, left : left + tile])
            if above:
                piece = _blended(above[index], piece, blend, axis=1)
            if row:
                piece = _blended(row[-1], piece, blend, axis=2)
            mx.eval(piece)
            row.append(piece)
        rows.append(mx.concatenate([piece[:, :kept, :kept] for piece in row], axis=2))
        mx.eval(rows[-1])
        above = row
    return mx.concatenate(rows, axis=1)


def _blended(before: mx.array, piece: mx.array, extent: int, axis: int) -> mx.array:
    """A tile whose first places go over from the last ones of the tile before, linearly."""
    extent = min(before.shape[axis], piece.shape[axis], extent)
    if not extent:
        return piece
    shape = [extent if at == axis else 1 for at in range(4)]
    share = (mx.arange(extent) / extent).reshape(shape).astype(piece.dtype)
    first, rest = mx.split(piece, [extent], axis=axis)
    last = mx.split(before, [before.shape[axis] - extent], axis=axis)[1]
    return mx.concatenate([last * (1 - share) + first * share, rest], axis=axis)
