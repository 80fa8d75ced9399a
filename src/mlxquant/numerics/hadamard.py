"""Regular Hadamard matrices and block rotations with them.

A regular Hadamard matrix has equal row sums, so a tensor whose channels share an offset does not pile it into one
channel, as a Sylvester matrix does with its constant first column (discrepancy 16 against 256 for blocks of 256). They
exist for powers of 4.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from .arrays import Array

H4 = np.ones((4, 4)) - 2 * np.eye(4)  # symmetric, H4 H4ᵀ = 4 I, rows sum to 2


@cache
def regular_hadamard(size: int) -> Array:
    """The orthogonal, symmetric matrix ``H4 ⊗ … ⊗ H4 / √size`` float32 [size,size] for a power of 4 (1 included);
    ValueError otherwise.
    """
    matrix: Array = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, H4)
    if len(matrix) != size:
        raise ValueError(f"regular Hadamard matrices have a power of 4 as their size, not {size}")
    scaled: Array = (matrix / np.sqrt(size)).astype(np.float32)
    scaled.setflags(write=False)  # one for all callers
    return scaled


def block_size(width: int, largest: int = 256) -> int:
    """The largest power of 4 up to ``largest`` that divides a width."""
    size = 1
    while size * 4 <= largest and width % (size * 4) == 0:
        size *= 4
    return size


def rotated(x: Array, block: int) -> Array:
    """x [...,n] with each ``block`` of channels rotated, in x's precision; ``rotated`` twice is x."""
    if block == 1:
        return x
    pieces = x.reshape(*x.shape[:-1], -1, block) @ regular_hadamard(block).astype(x.dtype)
    return pieces.reshape(x.shape)


def rotated_blocks(x: mx.array, block: int) -> mx.array:
    """``rotated`` in MLX, for x [...,n] float32."""
    return (x.reshape(*x.shape[:-1], -1, block) @ mx.array(regular_hadamard(block))).reshape(x.shape)
