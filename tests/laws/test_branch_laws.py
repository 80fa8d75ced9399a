"""Laws that every low-rank branch keeps, over the whole registry."""

import numpy as np
import pytest

from mlxquant.errors import CalibrationError, NumericsError
from mlxquant.grids.weights import WeightFormat
from mlxquant.methods.registry import get, members
from mlxquant.methods.weights.lowrank import DAMPINGS, TRIAL_TURNS, TURNS
from mlxquant.numerics.moments import Moments, energy

METHODS = members("branch")
every_branch = pytest.mark.parametrize(
    "find", [method.function for method in METHODS], ids=[method.name for method in METHODS]
)


def layer(out=40, width=64, tokens=300, seed=0):
    """A weight with a decaying spectrum [out,in] and the moments of correlated inputs with an outlier, a quarter of
    them held out.
    """
    rng = np.random.default_rng(seed)
    weight = (
        rng.standard_normal((out, 8)) @ rng.standard_normal((8, width)) * 0.1 + rng.standard_normal((out, width)) * 0.1
    )
    mixing = rng.standard_normal((width, width)) * np.linspace(2, 0.1, width)
    mixing[:, 3] *= 10
    moments = Moments.empty(width, np.float64)
    moments.add(rng.standard_normal((tokens - tokens // 4, width)) @ mixing)
    moments.add(rng.standard_normal((tokens // 4, width)) @ mixing, held_out=True)
    return weight, moments


def to_nearest(bits=3):
    """A rounding of residuals that counts how often it was asked."""

    def quantize(residual, moments=None):
        quantize.calls += 1
        grid = get("steps", "extremes").function(residual, WeightFormat(bits))
        return grid.dequantize(grid.quantize(residual))

    quantize.calls = 0
    return quantize


@every_branch
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (5, 64), (64, 5)])
@pytest.mark.parametrize("rank", [1, 4, 32])
def test_factors_are_small_and_finite(find, shape, rank):
    weight, moments = layer(*shape)
    branch = find(weight, moments, rank, to_nearest())
    used = min(rank, *shape)
    assert branch.rank == used
    assert (branch.up.shape, branch.down.shape) == ((shape[0], used), (used, shape[1]))
    assert branch.up.dtype == branch.down.dtype == np.float16
    assert np.isfinite(branch.weight).all()
    assert np.linalg.matrix_rank(branch.up.astype(np.float64) @ branch.down.astype(np.float64)) <= used


@every_branch
@pytest.mark.parametrize("power", [-40, -20, 20])
def test_a_branch_follows_the_weight(find, power):
    """Of a weight times a power of two it holds as much: where float16 is too small for that its factors are
    float32.
    """
    weight, moments = layer()
    left = []
    for values in (weight, np.ldexp(weight, power)):
        branch = find(values, moments, 4, to_nearest())
        left.append(np.linalg.norm(values - branch.weight) / np.linalg.norm(values))
    assert left[1] == pytest.approx(left[0], rel=1e-2)
    assert branch.up.dtype == branch.down.dtype == (np.float32 if power == -40 else np.float16)


@every_branch
def test_nothing_is_lost_between_branch_and_residual(find):
    """W = L + R with L as it is stored and runs."""
    weight, moments = layer()
    seen = []

    def exact(residual, moments):
        seen.append(residual)
        return residual

    branch = find(weight, moments, 4, exact)
    stored = branch.up.astype(np.float64) @ branch.down.astype(np.float64)
    assert min(np.abs(stored + residual - weight).max() for residual in seen) < 1e-6


@every_branch
def test_the_residual_is_easier_to_quantize_than_the_weight(find):
    weight, moments = layer()
    quantize = to_nearest()
    branch = find(weight, moments, 8, quantize)
    assert quantize.calls <= TURNS + TRIAL_TURNS * len(DAMPINGS)
    residual = weight - branch.weight
    without, beside = (energy(w - quantize(w), moments.gram).sum() for w in (weight, residual))
    assert beside < 0.6 * without


@every_branch
def test_the_same_comes_out_every_time_and_nothing_changes(find):
    weight, moments = layer()
    kept = weight.copy(), moments.gram.copy()
    first, second = find(weight, moments, 4, to_nearest()), find(weight, moments, 4, to_nearest())
    np.testing.assert_array_equal(first.up, second.up)
    np.testing.assert_array_equal(first.down, second.down)
    np.testing.assert_array_equal(weight, kept[0])
    np.testing.assert_array_equal(moments.gram, kept[1])


@every_branch
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_scales_of_weights_fit_into_float16(find, scale):
    """With nothing quantized, because codes may flip at the last digit."""
    weight, moments = layer()
    plain, scaled = (
        find(w, moments, 4, lambda residual, moments: np.zeros_like(residual)) for w in (weight, weight * scale)
    )
    np.testing.assert_allclose(scaled.weight / scale, plain.weight, atol=3e-3 * np.abs(plain.weight).max())


@every_branch
def test_dead_inputs_and_weights_are_survived(find):
    weight, moments = layer()
    for dead in (Moments(np.zeros((64, 64)), 10), moments):
        assert not find(np.zeros_like(weight), dead, 4, to_nearest()).weight.any()
    assert np.isfinite(find(weight, Moments(np.zeros((64, 64)), 10), 4, to_nearest()).weight).all()


@every_branch
def test_what_cannot_be_done_is_refused(find):
    weight, moments = layer()
    with pytest.raises(CalibrationError, match="calibrate first"):
        find(weight, None, 4, to_nearest())
    with pytest.raises(CalibrationError, match="do not belong"):
        find(weight[:, :8], moments, 4, to_nearest())
    weight[3, 4] = np.nan
    with pytest.raises(NumericsError, match="NaN or infinite"):
        find(weight, moments, 4, to_nearest())
