"""Rotations to start from, and Cayley steps that stay rotations (arXiv 2405.16406, 2002.01113).

A hidden state x becomes ``x R``. Behind a LayerNorm, which subtracts the mean over channels, R has to keep the vector
of ones: then mean and spread of ``x R`` are those of x, and the norm commutes with R. Everything is float64.
"""

from __future__ import annotations

import numpy as np

from .arrays import Array
from .hadamard import block_size, regular_hadamard

STARTS = ("hadamard", "random", "identity")
TINY = 1e-12
CLIP = 0.2  # the largest ‖W‖₁ that counts in full


def start(kind: str, size: int, keeps_ones: bool, rng: np.random.Generator) -> Array:
    """An orthogonal matrix [size,size] of a kind in ``STARTS``; "identity" turns nothing yet. With ``keeps_ones`` R 1 =
    1 holds.

    Raises ValueError on another kind.
    """
    if kind not in STARTS:
        raise ValueError(f"unknown kind of rotation {kind!r}; expected one of {STARTS}")
    if kind == "identity":
        return np.eye(size)
    if kind == "random" or block_size(size, size) == 1:
        return random_rotation(size, keeps_ones, rng)
    matrix = even_rotation(size, rng)
    return (
        matrix if keeps_ones else rng.choice([-1.0, 1.0], size)[:, None] * matrix
    )  # QuaRot's signs; they do not keep ones


def random_rotation(size: int, keeps_ones: bool, rng: np.random.Generator) -> Array:
    """An orthogonal matrix [size,size], uniform over all of them, or over those with R 1 = 1."""
    if not keeps_ones:
        q, r = np.linalg.qr(rng.standard_normal((size, size)))
        return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    matrix = np.eye(size)
    matrix[1:, 1:] = random_rotation(size - 1, False, rng)
    mirror = _mirror(size)
    return mirror @ matrix @ mirror


def _mirror(size: int) -> Array:
    """The reflection [size,size] that swaps the first axis and the direction of ones."""
    across = np.full(size, size**-0.5)
    across[0] -= 1
    length = across @ across
    return np.eye(size) if length < TINY else np.eye(size) - np.outer(across, across) * (2 / length)


def even_rotation(size: int, rng: np.random.Generator) -> Array:
    """An orthogonal matrix [size,size] with R 1 = 1 whose entries are of about one magnitude, for a size that 4
    divides.

    With b the largest power of 4 in size = m b: for m = 1 the regular Hadamard matrix, for m = 3 it times (2/3 J − I).
    For others that factor would leave a channel almost to itself (for m = 2 it only swaps two), so blocks are mixed,
    shuffled and mixed again.
    """
    block = block_size(size, size)
    count = size // block
    hadamard = regular_hadamard(block).astype(np.float64)
    if count <= 3 and count != 2:
        return np.kron(2 / count * np.ones((count, count)) - np.eye(count), hadamard)
    blocks = np.kron(np.eye(count), hadamard)
    return blocks[:, rng.permutation(size)] @ blocks


def cayley_step(
    rotation: Array, gradient: Array, rate: float, momentum: Array, inertia: float, keeps_ones: bool
) -> tuple[Array, Array]:
    """One step of gradient descent that stays orthogonal: the next rotation and momentum, both like ``rotation``
    [...,n,n].

    Source: 2002.01113, algorithm 1, for square matrices X: M ← βM − G; W = (M Xᵀ − X Mᵀ)/2; M ← W X; α = min(rate,
    1/‖W‖₁); Y = X + α/2 W (X + Y). Departures: the paper iterates the last equation twice, which drifts off the
    manifold; here it is solved, and what roundings leave is polished by one Newton step. W is clipped, because 1/‖W‖₁
    alone allows turns by a radian, after which a rounded network's gradient says nothing. With ``keeps_ones`` W is
    projected so that W 1 = 0, and R 1 = 1 stays.
    """
    momentum = inertia * momentum - gradient
    skew = momentum @ _transposed(rotation)
    skew = (skew - _transposed(skew)) / 2
    if keeps_ones:
        skew = skew - skew.mean(-1, keepdims=True)
        skew = skew - skew.mean(-2, keepdims=True)
    size = rotation.shape[-1]
    norm = np.maximum(np.abs(skew).sum(-2).max(-1)[..., None, None], TINY)
    half = np.minimum(rate * np.minimum(1, CLIP / norm), 1 / norm) / 2 * skew
    ahead = np.linalg.solve(np.eye(size) - half, rotation + half @ rotation)
    return ahead @ (1.5 * np.eye(size) - 0.5 * _transposed(ahead) @ ahead), skew @ rotation


def drift(rotation: Array) -> float:
    """The largest entry of R Rᵀ − I, for R [...,n,n]."""
    return float(np.abs(rotation @ _transposed(rotation) - np.eye(rotation.shape[-1])).max())


def _transposed(matrix: Array) -> Array:
    return np.swapaxes(matrix, -1, -2)
