"""Regular Hadamard matrices: orthogonal, symmetric, even row sums, and blocks that fit."""

import numpy as np
import pytest

from mlxquant.numerics.hadamard import block_size, regular_hadamard, rotated


@pytest.mark.parametrize("size", [1, 4, 16, 64, 256])
def test_the_matrix_is_orthogonal_symmetric_and_regular(size):
    matrix = regular_hadamard(size).astype(np.float64)
    np.testing.assert_array_equal(matrix @ matrix.T, np.eye(size))
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.abs(matrix), np.sqrt(1 / size))
    np.testing.assert_array_equal(
        matrix.sum(0), np.ones(size)
    )  # a Sylvester matrix has √size in one column and 0 in the others


def test_the_shared_matrix_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        regular_hadamard(4)[0, 0] = 1


@pytest.mark.parametrize("size", [0, 2, 3, 8, 12, 32, 128])
def test_other_sizes_have_none(size):
    with pytest.raises(ValueError, match="a power of 4"):
        regular_hadamard(size)


def test_blocks_are_the_largest_that_divide_the_width():
    assert [block_size(width) for width in (1536, 6144, 4096, 192, 768, 96, 12, 6, 7)] == [
        256,
        256,
        256,
        64,
        256,
        16,
        4,
        1,
        1,
    ]
    assert block_size(1536, 64) == 64
    assert block_size(1536, 63) == 16


@pytest.mark.parametrize("block", [1, 4, 16])
def test_a_rotation_is_a_block_matrix_and_its_own_inverse(block):
    x = np.random.default_rng(0).standard_normal((2, 3, 48))
    matrix = np.kron(np.eye(48 // block), regular_hadamard(block))
    np.testing.assert_allclose(rotated(x, block), x @ matrix, atol=1e-14)
    np.testing.assert_allclose(rotated(rotated(x, block), block), x, atol=1e-14)
    assert rotated(x.astype(np.float32), block).dtype == np.float32
