"""PTQ4DiT's balance: rank correlation, the timesteps' shares, and one timestep as SmoothQuant."""

import numpy as np
import pytest

from mlxquant.methods.transforms.ptq4dit import calibrated_salience, ptq4dit, rank_correlation, ranks
from mlxquant.methods.transforms.smoothquant import divisor
from mlxquant.numerics.input_ranges import InputRanges
from mlxquant.numerics.transform import Place


def by_counting(values):
    """Ranks by comparing every pair."""
    values = np.asarray(values)
    return [float((values < v).sum() + ((values == v).sum() - 1) / 2) for v in values]


@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_their_correlation(seed):
    a, b = np.random.default_rng(seed).integers(0, 12, (2, 30)).astype(np.float32)
    np.testing.assert_array_equal(ranks(a), by_counting(a))
    assert rank_correlation(a, b) == pytest.approx(np.corrcoef(by_counting(a), by_counting(b))[0, 1], abs=1e-12)


def test_known_correlations():
    a = np.array([1.0, 5, 2, 9])
    assert rank_correlation(a, np.exp(a)) == 1
    assert rank_correlation(a, -(a**3)) == -1
    assert rank_correlation(a, np.ones(4)) == 0
    assert rank_correlation(np.array([1.0, 2, 3, 4, 5]), np.array([5.0, 6, 7, 8, 7])) == pytest.approx(
        0.8207826816681233
    )  # SciPy's


def test_timesteps_count_the_more_the_less_they_agree_with_the_weights():
    columns = np.array([1.0, 2, 3, 4])
    agrees, disagrees = np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])
    share = np.exp(1) / (np.exp(1) + np.exp(-1))
    np.testing.assert_allclose(
        calibrated_salience(np.stack([agrees, disagrees]), columns), share * disagrees + (1 - share) * agrees
    )


def test_one_timestep_is_smoothquant_at_a_half():
    rng = np.random.default_rng(0)
    most = np.exp(rng.normal(size=(1, 20))).astype(np.float32)
    weights = [rng.normal(size=(5, 20)), rng.normal(size=(3, 20))]
    ranges = InputRanges(np.ones(1), -most / 2, most, -most / 2, most, np.zeros((1, 2, 20), np.float32))
    (found,) = ptq4dit(ranges, weights, Place())
    np.testing.assert_allclose(found.divisor, divisor(most[0], weights, 0.5), rtol=1e-6)
    columns = np.abs(np.concatenate(weights)).max(0)
    np.testing.assert_allclose(np.ptp(np.log(found.divisor) - 0.5 * np.log(most[0] / columns)), 0, atol=1e-5)
