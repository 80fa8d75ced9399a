"""TCAQ-DM's joint ratios: shares that sum to one, bounds, and the static case."""

import numpy as np
import pytest

from mlxquant.methods.transforms.smoothquant import divisor
from mlxquant.methods.transforms.tcaq import joint_ratios, tcaq, timestep_weights
from mlxquant.numerics.input_ranges import InputRanges
from mlxquant.numerics.transform import Place


def peaks(levels=5, width=12, seed=0):
    return np.exp(np.random.default_rng(seed).normal(size=(levels, width))) * np.arange(1, levels + 1)[:, None]


def test_the_ratios_are_the_papers():
    seen = np.array([[1.0, 2, 4], [9, 3, 6]])
    shares = 7 / 25, 18 / 25
    wanted = [shares[0] * 1 + shares[1] * 3, shares[0] * 2 + shares[1] * 1, shares[0] * 4 + shares[1] * 2]
    np.testing.assert_allclose(joint_ratios(seen), wanted, rtol=1e-6)
    np.testing.assert_allclose(timestep_weights(seen), shares)
    assert joint_ratios(seen).dtype == np.float32


@pytest.mark.parametrize("seen", [peaks(), peaks(1), peaks() * 0, peaks() * 1e-30])
def test_shares_sum_to_one(seen):
    assert timestep_weights(seen).sum() == pytest.approx(1)
    assert (timestep_weights(seen) >= 0).all()


@pytest.mark.parametrize("bound", [1.0, 2.0, 10.0])
def test_ratios_stay_between_one_and_the_bound(bound):
    found = joint_ratios(peaks(), bound)
    assert found.min() >= 1
    assert found.max() <= bound
    np.testing.assert_array_equal(found, np.minimum(joint_ratios(peaks(), np.inf), np.float32(bound)))


def test_one_timestep_evens_the_inputs_out_as_smoothquant_at_one():
    seen = peaks(1)
    found = joint_ratios(seen, np.inf)
    np.testing.assert_allclose(seen[0] / found, seen.min(), rtol=1e-6)
    smooth = divisor(seen[0], [np.ones((2, 12))], alpha=1.0)
    np.testing.assert_allclose(found / smooth, found[0] / smooth[0], rtol=1e-5)


def test_scale_does_not_matter_and_equal_timesteps_are_one():
    np.testing.assert_allclose(joint_ratios(7 * peaks()), joint_ratios(peaks()), rtol=1e-6)
    np.testing.assert_allclose(joint_ratios(np.repeat(peaks(1), 4, 0)), joint_ratios(peaks(1)), rtol=1e-6)


def test_dead_channels_neither_count_nor_set_the_measure():
    seen = peaks()
    with_dead = np.concatenate([seen, np.zeros((5, 1))], 1)
    np.testing.assert_allclose(joint_ratios(with_dead)[:-1], joint_ratios(seen), rtol=1e-6)
    assert joint_ratios(with_dead)[-1] == 1
    with_dead[2] = 0
    alive = np.delete(with_dead, 2, 0)
    np.testing.assert_allclose(joint_ratios(with_dead), joint_ratios(alive), rtol=1e-6)
    np.testing.assert_array_equal(joint_ratios(np.zeros((3, 4))), np.ones(4))


def test_a_channel_that_is_dead_at_times_counts_at_the_others():
    seen = np.array([[1.0, 4, 0], [1, 2, 8]])
    assert joint_ratios(seen)[2] == 8


def test_candidates_look_at_both_ends_of_the_range():
    least, most = -peaks(seed=1).astype(np.float32), peaks(seed=2).astype(np.float32)
    ranges = InputRanges(np.linspace(0, 1, 5), least, most, least, most, np.zeros((5, 2, 12), np.float32))
    found = tcaq(ranges, [np.ones((3, 12))], Place())
    np.testing.assert_array_equal(found[0].divisor, joint_ratios(np.maximum(-least, most), 10.0))
    np.testing.assert_array_equal(found[1].divisor, joint_ratios(np.maximum(-least, most), 100.0))
