"""The low-rank fit against LAPACK, and the turns that only get better."""

import numpy as np
import pytest

from mlxquant.grids.weights import WeightFormat
from mlxquant.methods.registry import get
from mlxquant.methods.weights.lowrank import (
    DAMPINGS,
    TRIAL_TURNS,
    Norm,
    by_turns,
    damped_norm,
    fitted,
    leading_directions,
    refitted,
    svd,
    whitened,
)
from mlxquant.numerics.low_rank import LowRank
from mlxquant.numerics.moments import Moments, energy


def problem(out=60, width=80, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((200, width)) @ (rng.standard_normal((width, width)) * np.linspace(2, 0.1, width))
    return rng.standard_normal((out, width)), Moments.of(inputs)


def nearest(residual, bits=3):
    grid = get("steps", "extremes").function(residual, WeightFormat(bits))
    return grid.dequantize(grid.quantize(residual))


def by_nearest(residual, moments):
    return nearest(residual)


def truncated(weight, rank):
    """The best approximation of this rank in the Frobenius norm, by LAPACK."""
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (200, 30)])
@pytest.mark.parametrize("rank", [1, 5, 30])
def test_leading_directions_are_lapacks(shape, rank):
    weight, moments = problem(*shape)
    for norm, matrix in ((Norm(), np.eye(shape[1])), (Norm(moments.gram, 3.0), moments.gram + 3 * np.eye(shape[1]))):
        found = leading_directions(weight, norm, rank)
        np.testing.assert_allclose(found.T @ found, np.eye(rank), atol=1e-10)
        values = np.linalg.eigvalsh(weight @ matrix @ weight.T)[::-1]
        held = np.diagonal(found.T @ weight @ matrix @ weight.T @ found)
        np.testing.assert_allclose(held, values[:rank], rtol=1e-3)
        assert held.sum() == pytest.approx(values[:rank].sum(), rel=1e-5)


def test_a_flat_spectrum_is_nearly_held():
    """White noise, the worst case for an iteration: nothing stands out."""
    weight = np.random.default_rng(0).standard_normal((400, 400)).astype(np.float32)
    found = leading_directions(weight, Norm(), 8)
    values = np.square(np.linalg.svd(weight, compute_uv=False))
    assert np.square(found.T @ weight).sum() > 0.98 * values[:8].sum()


def test_the_plain_fit_is_the_truncated_svd():
    weight, _ = problem()
    found = fitted(weight, Norm(), 6)
    np.testing.assert_allclose(found.weight, truncated(weight, 6), atol=5e-3)
    np.testing.assert_allclose(np.linalg.norm(found.up, axis=0), np.linalg.norm(found.down, axis=1), rtol=1e-2)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10])
def test_the_whitened_fit_is_that_of_the_factorized_problem(damping):
    """(W C)_r C⁻¹ with H + damping I = C Cᵀ, computed as it is written."""
    weight, moments = problem()
    norm = damped_norm(moments.gram, damping)
    hessian = moments.gram + norm.ridge * np.eye(80)
    factor = np.linalg.cholesky(hessian)
    wanted = truncated(weight @ factor, 6) @ np.linalg.inv(factor)
    found = fitted(weight, norm, 6).weight
    np.testing.assert_allclose(found, wanted, atol=5e-3 * np.abs(wanted).max())
    plain = truncated(weight, 6)
    assert energy(weight - found, hessian).sum() <= energy(weight - plain, hessian).sum()


def test_much_damping_is_the_plain_svd():
    weight, moments = problem()
    np.testing.assert_allclose(
        fitted(weight, damped_norm(moments.gram, 1e9), 6).weight, fitted(weight, Norm(), 6).weight, atol=2e-3
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("whiten", [False, True])
def test_more_turns_are_never_worse(bits, whiten):
    weight, moments = problem()
    norm = damped_norm(moments.gram, 0.1) if whiten else Norm()
    errors = []
    for turns in (1, 2, 4, 8):
        branch, error = by_turns(weight, moments.gram, 6, lambda residual: nearest(residual, bits), norm, turns)
        residual = weight - branch.weight
        assert error == pytest.approx(energy(residual - nearest(residual, bits), moments.gram).sum(), rel=1e-9)
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert not whiten or errors[-1] < 0.9 * errors[0]


def test_whitening_pays_where_an_input_stands_out():
    """20 times larger than the others, and rounding that knows nothing of it."""
    weight, moments = problem()
    moments = moments.divided(np.where(np.arange(80) == 3, 1 / 20, 1.0))
    errors = []
    for method in (svd, whitened):
        residual = weight - method(weight, moments, 6, by_nearest).weight
        errors.append(energy(residual - nearest(residual), moments.gram).sum())
    assert errors[1] < 0.3 * errors[0]


def test_the_damping_follows_the_tokens_that_were_held_out(monkeypatch):
    """A fit to fewer tokens than channels is not believed when other tokens contradict it, which nothing else sees
    before.
    """
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((60, 80))
    moments = Moments.empty(80, np.float64)
    moments.add(rng.standard_normal((10, 80)))
    moments.add(rng.standard_normal((2000, 80)), held_out=True)
    used = []
    monkeypatch.setattr(
        "mlxquant.methods.weights.lowrank.damped_norm",
        lambda gram, damping: used.append(damping) or damped_norm(gram, damping),
    )
    counts = []
    branch = whitened(weight, moments, 6, lambda residual, seen: counts.append(seen.count) or nearest(residual, 6))
    assert used[-1] == branch.damping == 100
    choosing = len(counts) - counts.count(moments.count)
    assert choosing >= len(DAMPINGS)
    assert set(counts[:choosing]) == {10}
    assert set(counts[choosing:]) == {2010}


@pytest.mark.parametrize("outlier", [1.0, 20.0])
def test_without_held_out_tokens_the_damping_is_the_best_on_all(outlier):
    weight, moments = problem()
    moments = moments.divided(np.where(np.arange(80) == 3, 1 / outlier, 1.0))
    branch = whitened(weight, moments, 6, by_nearest)
    errors = {
        d: by_turns(weight, moments.gram, 6, nearest, damped_norm(moments.gram, d), TRIAL_TURNS)[1] for d in DAMPINGS
    }
    assert branch.damping == min(errors, key=errors.get)


def test_a_last_fit_never_hurts():
    weight, moments = problem()
    branch = svd(weight, moments, 6, by_nearest)
    rounded = nearest(weight - branch.weight)
    again = refitted(branch, weight, rounded, moments)
    errors = [energy(weight - rounded - b.weight, moments.gram).sum() for b in (branch, again)]
    assert errors[1] < 0.9 * errors[0]
    assert again.rank == branch.rank
    assert refitted(again, weight, rounded, moments, damping=1e9) is again


def test_a_branch_is_its_product():
    branch = LowRank(np.float16([[1], [2]]), np.float16([[3, 4, 5]]))
    np.testing.assert_array_equal(branch.weight, [[3, 4, 5], [6, 8, 10]])
    assert branch.weight.dtype == np.float32
    assert branch.rank == 1
