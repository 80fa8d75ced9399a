"""Packed weights back to numbers inside MLX's graph, whatever their width: for layers that look rows up or convolve.

MLX's own kernel reads widths that are a multiple of 32, in all widths of codes but 7 bits. Kernels of convolutions are
rarely so wide (3 x 3 x 3 is 27 columns): they are read with zeros behind them, which are then cut off.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..errors import NumericsError
from ..numerics.arrays import Array
from .weights import GROUPS


def unpacked(words: mx.array, bits: int, width: int) -> mx.array:
    """``unpack`` as a part of a graph: words uint32 [rows, words] to codes uint8 [rows, width]. Eight codes
    fill ``bits`` bytes.
    """
    rows, count = words.shape[0], -(-width // 8)
    stream = _widened(words.view(mx.uint8), count * bits).reshape(rows, count, bits).astype(mx.uint64)
    eights = (stream << mx.array(np.arange(bits, dtype=np.uint64) * 8)).sum(-1, keepdims=True)
    codes = eights >> mx.array(np.arange(8, dtype=np.uint64) * bits) & (2**bits - 1)
    return codes.astype(mx.uint8).reshape(rows, 8 * count)[:, :width]


def dequantized(words: mx.array, scales: mx.array, biases: mx.array, bits: int, width: int) -> mx.array:
    """``scale * code + bias`` float32 [rows, width] of words uint32 [rows, words]; scales and biases are float32 [rows
    or 1, groups].
    """
    rows, groups, columns = words.shape[0], scales.shape[1], width // scales.shape[1]
    if bits == 7 or rows == 0:
        codes = unpacked(words, bits, width).astype(mx.float32).reshape(rows, groups, columns)
        return (codes * scales[..., None] + biases[..., None]).reshape(rows, width)
    size = next((size for size in reversed(GROUPS) if columns % size == 0), min(GROUPS))
    each = -(-columns // size)  # of MLX's groups to one of ours, which is the only one where they do not divide it
    words = _widened(words, groups * each * size * bits // 32)
    scales, biases = (
        mx.broadcast_to(v[..., None], (rows, groups, each)).reshape(rows, groups * each) for v in (scales, biases)
    )
    return mx.dequantize(words, scales, biases, group_size=size, bits=bits)[:, :width]


def _widened(stream: mx.array, width: int) -> mx.array:
    """A stream of bits [rows, ...] as [rows, width]: with zeros behind it, or without what it has behind."""
    return mx.pad(stream, [(0, 0), (0, max(0, width - stream.shape[1]))])[:, :width]


def pack(codes: Array, bits: int) -> Array:
    """Codes [out, in] to MLX's packed layout: one little-endian bit stream a row, uint32 [out, ceil(in * bits / 32)].

    For the widths that MLX accepts this is bit for bit what ``mx.quantize`` stores. Eight codes at a time fill ``bits``
    bytes.
    """
    rows, width = codes.shape
    if codes.size and int(codes.max()) >= 2**bits:
        raise NumericsError(f"code {int(codes.max())} does not fit in {bits} bits")
    words = -(-width * bits // 32)
    eights = np.zeros((rows, -(-words * 4 // bits)), "<u8")
    for place in range(8):
        column = codes[:, place::8]
        eights[:, : column.shape[1]] |= column.astype("<u8") << np.uint64(bits * place)
    stream = eights.view(np.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    return np.ascontiguousarray(stream[:, : 4 * words]).view("<u4").astype(np.uint32)


def unpack(words: Array, bits: int, width: int) -> Array:
    """The inverse of ``pack``: uint8 codes [out, width]."""
    rows, count = len(words), -(-width // 8)
    stream = np.ascontiguousarray(words, "<u4").view(np.uint8)[:, : count * bits]
    padded = np.zeros((rows, count * bits), np.uint8)
    padded[:, : stream.shape[1]] = stream
    eights = np.zeros((rows, count, 8), np.uint8)
    eights[:, :, :bits] = padded.reshape(rows, count, bits)
    values = eights.reshape(rows, -1).view("<u8")
    codes = np.empty((rows, 8 * count), np.uint8)
    for place in range(8):
        codes[:, place::8] = (values >> np.uint64(bits * place)) & np.uint64(2**bits - 1)
    return np.ascontiguousarray(codes[:, :width])
