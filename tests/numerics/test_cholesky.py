"""Our Cholesky factors against NumPy's, at sizes that are halved evenly and unevenly."""

import tracemalloc

import numpy as np
import pytest

from mlxquant.numerics import cholesky
from mlxquant.numerics.cholesky import Factor, factorize, solve_lower, solve_transposed


def positive_definite(size, dtype=np.float64):
    rows = np.random.default_rng(size).standard_normal((2 * size, size))
    return (rows.T @ rows).astype(dtype)


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 129, 300])
@pytest.mark.parametrize("panel", [40, 512])
def test_it_is_the_factor_of_numpy(size, panel, monkeypatch):
    monkeypatch.setattr(cholesky, "PANEL", panel)
    matrix = positive_definite(size)
    factor = matrix.copy()
    factorize(factor)
    np.testing.assert_allclose(np.tril(factor), np.linalg.cholesky(matrix), rtol=1e-9, atol=1e-12)


def test_nearly_singular_matrices_are_factored_as_well():
    rows = np.random.default_rng(0).standard_normal((30, 300))
    matrix = rows.T @ rows + 1e-6 * np.eye(300)  # condition 1e9
    factor = matrix.copy()
    factorize(factor)
    factor = np.tril(factor)
    np.testing.assert_allclose(factor @ factor.T, matrix, atol=1e-11 * np.abs(matrix).max())


def test_float32_stays_float32():
    matrix = positive_definite(200, np.float32)
    factor = matrix.copy()
    factorize(factor)
    assert factor.dtype == np.float32
    np.testing.assert_allclose(np.tril(factor), np.linalg.cholesky(matrix), rtol=1e-3, atol=1e-3)


def test_what_is_above_the_diagonal_is_not_read():
    matrix = positive_definite(200)
    factor, other = matrix.copy(), np.tril(matrix) + np.triu(np.full((200, 200), 7.0), 1)
    factorize(factor)
    factorize(other)
    np.testing.assert_array_equal(np.tril(other), np.tril(factor))


@pytest.mark.parametrize("place", [0, 70, 199])
def test_a_matrix_that_is_not_positive_definite_is_refused(place):
    matrix = positive_definite(200)
    matrix[place, place] = -1
    with pytest.raises(np.linalg.LinAlgError):
        factorize(matrix)


def test_it_works_in_place():
    matrix = positive_definite(1024)
    tracemalloc.start()
    factorize(matrix)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.4 * matrix.nbytes


@pytest.mark.parametrize("size", [3, 128, 129, 300])
def test_systems_are_solved_from_either_side(size):
    matrix, rows = positive_definite(size), np.random.default_rng(1).standard_normal((7, size))
    factor, lower = matrix.copy(), np.linalg.cholesky(matrix)
    factorize(factor)
    for solve, side in ((solve_transposed, lower.T), (solve_lower, lower)):
        found = rows.copy()
        solve(factor, found)
        np.testing.assert_allclose(found @ side, rows, atol=1e-9)


@pytest.mark.parametrize(("size", "rows"), [(5, 3), (300, 2), (140, 700)])
def test_a_factor_solves_in_the_matrix_own_order(size, rows):
    """The diagonal neither ascends nor descends, so that the factor's order is another."""
    spread = np.random.default_rng(2).permutation(np.geomspace(0.1, 10, size))
    matrix = positive_definite(size) * spread * spread[:, None]
    factor = Factor.of(matrix)
    assert (np.diff(np.diagonal(matrix)[factor.order]) >= 0).all()
    assert (factor.order != np.arange(size)).any()
    lower = np.tril(factor.lower)
    np.testing.assert_allclose(lower @ lower.T, matrix[factor.order][:, factor.order], rtol=1e-9, atol=1e-9)
    wanted = np.random.default_rng(3).standard_normal((rows, size))
    np.testing.assert_allclose(factor.solve(wanted) @ matrix, wanted, atol=1e-8)


def test_a_factor_of_another_diagonal_is_that_of_a_copy():
    matrix, diagonal = positive_definite(300), np.random.default_rng(4).uniform(400, 900, 300)
    copy = matrix.copy()
    np.fill_diagonal(copy, diagonal)
    one, other = Factor.of(matrix, diagonal), Factor.of(copy)
    np.testing.assert_array_equal(one.order, other.order)
    np.testing.assert_array_equal(np.tril(one.lower), np.tril(other.lower))
