"""TCAQ-DM's joint ratios and our variant: each against its formula in plain Python, bounds, and the static case."""

import numpy as np
import pytest

from mlxquant.methods.transforms.smoothquant import divisor
from mlxquant.methods.transforms.tcaq import joint_ratios, tcaq, tcaq_timestep, timestep_ratios, timestep_weights
from mlxquant.numerics.input_ranges import InputRanges
from mlxquant.numerics.transform import Place

both = pytest.mark.parametrize("ratios", [joint_ratios, timestep_ratios])


def peaks(levels=5, width=12, seed=0):
    return np.exp(np.random.default_rng(seed).normal(size=(levels, width))) * np.arange(1, levels + 1)[:, None]


def published(seen):
    """``r_c = Σ_t r_tc peak_tc / Σ_t peak_tc`` with ``r_tc = peak_tc / min_c peak_tc``, in Python's floats."""
    rows = seen.tolist()
    return [sum(row[c] / min(row) * row[c] for row in rows) / sum(row[c] for row in rows) for c in range(seen.shape[1])]


def ours(seen):
    """``r_c = Σ_t w_t r_tc`` with w_t the timestep's share of all peaks, in Python's floats."""
    rows = seen.tolist()
    total = sum(map(sum, rows))
    return [sum(sum(row) / total * row[c] / min(row) for row in rows) for c in range(seen.shape[1])]


@pytest.mark.parametrize("seed", range(3))
def test_each_is_its_own_formula_in_float64(seed):
    seen = peaks(seed=seed)
    np.testing.assert_allclose(joint_ratios(seen, np.inf), published(seen), rtol=1e-7)
    np.testing.assert_allclose(timestep_ratios(seen, np.inf), ours(seen), rtol=1e-7)
    assert np.abs(joint_ratios(seen, np.inf) / timestep_ratios(seen, np.inf) - 1).max() > 0.05


def test_the_ratios_are_the_papers():
    """By hand: the weights of a channel over the timesteps are its own peaks, 1:9, 2:3 and 4:6."""
    seen = np.array([[1.0, 2, 4], [9, 3, 6]])
    wanted = [(1 * 1 + 9 * 3) / 10, (2 * 2 + 3 * 1) / 5, (4 * 4 + 6 * 2) / 10]
    np.testing.assert_allclose(joint_ratios(seen), wanted, rtol=1e-6)
    assert joint_ratios(seen).dtype == np.float32


def test_the_variant_has_one_weight_a_timestep():
    seen = np.array([[1.0, 2, 4], [9, 3, 6]])
    shares = 7 / 25, 18 / 25
    wanted = [shares[0] * 1 + shares[1] * 3, shares[0] * 2 + shares[1] * 1, shares[0] * 4 + shares[1] * 2]
    np.testing.assert_allclose(timestep_ratios(seen), wanted, rtol=1e-6)
    np.testing.assert_allclose(timestep_weights(seen), shares)


@pytest.mark.parametrize("seen", [peaks(), peaks(1), peaks() * 0, peaks() * 1e-30])
def test_shares_sum_to_one(seen):
    assert timestep_weights(seen).sum() == pytest.approx(1)
    assert (timestep_weights(seen) >= 0).all()


@both
@pytest.mark.parametrize("bound", [1.0, 2.0, 10.0])
def test_ratios_stay_between_one_and_the_bound(ratios, bound):
    found = ratios(peaks(), bound)
    assert found.min() >= 1
    assert found.max() <= bound
    np.testing.assert_array_equal(found, np.minimum(ratios(peaks(), np.inf), np.float32(bound)))


@both
def test_one_timestep_evens_the_inputs_out_as_smoothquant_at_one(ratios):
    seen = peaks(1)
    found = ratios(seen, np.inf)
    np.testing.assert_allclose(seen[0] / found, seen.min(), rtol=1e-6)
    smooth = divisor(seen[0], [np.ones((2, 12))], alpha=1.0)
    np.testing.assert_allclose(found / smooth, found[0] / smooth[0], rtol=1e-5)


@both
def test_scale_does_not_matter_and_equal_timesteps_are_one(ratios):
    np.testing.assert_allclose(ratios(7 * peaks()), ratios(peaks()), rtol=1e-6)
    np.testing.assert_allclose(ratios(np.repeat(peaks(1), 4, 0)), ratios(peaks(1)), rtol=1e-6)


@both
def test_dead_channels_neither_count_nor_set_the_measure(ratios):
    seen = peaks()
    with_dead = np.concatenate([seen, np.zeros((5, 1))], 1)
    np.testing.assert_allclose(ratios(with_dead)[:-1], ratios(seen), rtol=1e-6)
    assert ratios(with_dead)[-1] == 1
    with_dead[2] = 0
    alive = np.delete(with_dead, 2, 0)
    np.testing.assert_allclose(ratios(with_dead), ratios(alive), rtol=1e-6)
    np.testing.assert_array_equal(ratios(np.zeros((3, 4))), np.ones(4))


@both
def test_a_channel_that_is_dead_at_times_counts_at_the_others(ratios):
    seen = np.array([[1.0, 4, 0], [1, 2, 8]])
    assert ratios(seen)[2] == 8


@pytest.mark.parametrize(("find", "ratios"), [(tcaq, joint_ratios), (tcaq_timestep, timestep_ratios)])
def test_candidates_look_at_both_ends_of_the_range(find, ratios):
    least, most = -peaks(seed=1).astype(np.float32), peaks(seed=2).astype(np.float32)
    ranges = InputRanges(np.linspace(0, 1, 5), least, most, least, most, np.zeros((5, 2, 12), np.float32))
    found = find(ranges, [np.ones((3, 12))], Place())
    np.testing.assert_array_equal(found[0].divisor, ratios(np.maximum(-least, most), 10.0))
    np.testing.assert_array_equal(found[1].divisor, ratios(np.maximum(-least, most), 100.0))
