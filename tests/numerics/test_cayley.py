"""Rotations to start from and Cayley steps: orthogonal, even, downhill, and the vector of ones stays where it
has to.
"""

import numpy as np
import pytest

from mlxquant.numerics.cayley import CLIP, STARTS, cayley_step, drift, even_rotation, start

SIZES = [1, 2, 3, 4, 8, 12, 20, 32, 48, 64, 96, 192]


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keeps_ones", [True, False])
def test_a_start_is_orthogonal_and_keeps_ones_where_asked(kind, size, keeps_ones):
    matrix = start(kind, size, keeps_ones, np.random.default_rng(0))
    assert matrix.shape == (size, size)
    assert matrix.dtype == np.float64
    assert drift(matrix) < 1e-13
    if keeps_ones:
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-13)
        np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-13)


@pytest.mark.parametrize("size", [32, 48, 64, 96, 128, 192, 320])
def test_every_channel_is_spread(size):
    """Also for twice a power of 4, where the block factor would only swap the halves."""
    largest = np.abs(even_rotation(size, np.random.default_rng(0))).max(1)
    assert (largest < 5 / np.sqrt(size)).all()


def test_random_starts_differ_by_seed_and_are_not_even():
    one, two = (start("random", 16, False, np.random.default_rng(seed)) for seed in (0, 1))
    assert np.abs(one - two).max() > 0.1


def test_the_identity_turns_nothing_yet():
    np.testing.assert_array_equal(start("identity", 4, True, np.random.default_rng(0)), np.eye(4))


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="hadamard"):
        start("turned", 4, False, np.random.default_rng(0))


def exact(rotation, gradient, rate):
    """The Cayley transform by its definition, (I − aW/2)⁻¹ (I + aW/2) X, with W of the gradient alone."""
    skew = (rotation @ gradient.T - gradient @ rotation.T) / 2
    norm = np.abs(skew).sum(0).max()
    rate = min(rate * min(1, CLIP / norm), 1 / norm)
    eye = np.eye(len(rotation))
    return np.linalg.inv(eye - rate / 2 * skew) @ (eye + rate / 2 * skew) @ rotation


@pytest.mark.parametrize("rate", [0.01, 1e6])
@pytest.mark.parametrize("size", [1e-3, 1])
def test_a_step_is_the_cayley_transform(rate, size):
    rng = np.random.default_rng(0)
    rotation, gradient = start("random", 12, False, rng), size * rng.standard_normal((12, 12))
    stepped, _ = cayley_step(rotation, gradient, rate, np.zeros((12, 12)), 0.9, keeps_ones=False)
    np.testing.assert_allclose(stepped, exact(rotation, gradient, rate), atol=1e-12)


@pytest.mark.parametrize("keeps_ones", [True, False])
def test_a_thousand_steps_do_not_drift(keeps_ones):
    """And they go downhill: to the rotation nearest to a matrix, which the singular vectors give."""
    rng = np.random.default_rng(1)
    size = 12
    target = start("random", size, keeps_ones, rng)
    rotation, speed = start("hadamard", size, keeps_ones, rng), np.zeros((size, size))
    if np.linalg.det(rotation) * np.linalg.det(target) < 0:  # no path leads from one sign to the other
        flip = start("random", size, True, rng)
        target = target @ (flip if np.linalg.det(flip) < 0 else flip @ _swap(size))
    before = np.abs(rotation - target).max()
    for _ in range(1000):
        rotation, speed = cayley_step(rotation, rotation - target, 0.1, speed, 0.9, keeps_ones)
        assert drift(rotation) < 1e-13
        if keeps_ones:
            np.testing.assert_allclose(rotation.sum(1), 1, atol=1e-12)
    assert np.abs(rotation - target).max() < 1e-3 * before


def _swap(size):
    return np.eye(size)[[1, 0, *range(2, size)]]


def test_steps_go_for_many_heads_at_once():
    rng = np.random.default_rng(2)
    rotations = np.stack([start("random", 5, False, rng) for _ in range(3)])
    gradients = rng.standard_normal((3, 5, 5))
    together, speed = cayley_step(rotations, gradients, 0.3, np.zeros((3, 5, 5)), 0.5, keeps_ones=False)
    for i in range(3):
        alone, own = cayley_step(rotations[i], gradients[i], 0.3, np.zeros((5, 5)), 0.5, keeps_ones=False)
        np.testing.assert_allclose(together[i], alone, atol=1e-14)
        np.testing.assert_allclose(speed[i], own, atol=1e-14)


def test_momentum_goes_on_where_the_gradient_ends():
    rng = np.random.default_rng(3)
    rotation = start("random", 6, False, rng)
    moved, speed = cayley_step(rotation, rng.standard_normal((6, 6)), 0.1, np.zeros((6, 6)), 0.9, keeps_ones=False)
    further, _ = cayley_step(moved, np.zeros((6, 6)), 0.1, speed, 0.9, keeps_ones=False)
    still, _ = cayley_step(moved, np.zeros((6, 6)), 0.1, speed, 0.0, keeps_ones=False)
    assert np.abs(further - moved).max() > 1e-3
    np.testing.assert_allclose(still, moved, atol=1e-15)


@pytest.mark.parametrize("keeps_ones", [True, False])
def test_momentum_is_a_direction_in_which_rotations_can_go(keeps_ones):
    """M Xᵀ is skew, and where ones are kept it takes them to nothing: what a gradient has beside that is gone."""
    rng = np.random.default_rng(4)
    rotation = start("random", 8, keeps_ones, rng)
    _, speed = cayley_step(rotation, rng.standard_normal((8, 8)), 0.1, rng.standard_normal((8, 8)), 0.9, keeps_ones)
    turn = speed @ rotation.T
    np.testing.assert_allclose(turn, -turn.T, atol=1e-13)
    assert np.abs(turn).max() > 0.1
    if keeps_ones:
        np.testing.assert_allclose(turn.sum(0), 0, atol=1e-13)


def test_a_step_brings_back_what_has_drifted():
    """From a rotation that went through float32: a solution keeps what it is given, the polish does not."""
    rng = np.random.default_rng(5)
    rotation = start("random", 32, False, rng).astype(np.float32).astype(np.float64)
    assert drift(rotation) > 1e-8
    stepped, _ = cayley_step(rotation, rng.standard_normal((32, 32)), 0.1, np.zeros((32, 32)), 0.9, keeps_ones=False)
    assert drift(stepped) < 1e-13


@pytest.mark.parametrize("keeps_ones", [False, True])
def test_random_rotations_favour_no_direction(keeps_ones):
    """The mean of many is that of all rotations: zero, or with ones kept what keeps them alone."""
    rng = np.random.default_rng(6)
    mean = np.mean([start("random", 4, keeps_ones, rng) for _ in range(2000)], axis=0)
    np.testing.assert_allclose(mean, np.full((4, 4), 0.25) if keeps_ones else 0, atol=0.06)
