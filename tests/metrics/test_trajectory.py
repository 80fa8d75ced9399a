"""Relative errors of latents, step by step."""

import numpy as np
import pytest

from mlxquant.errors import NumericsError
from mlxquant.metrics.trajectory import trajectory_error

RNG = np.random.default_rng(0)
REFERENCE = [RNG.standard_normal((2, 4, 4, 3)) for _ in range(3)]


def test_error_is_relative_and_per_sample():
    latents = [y * np.array([1 + 0.1 * s, 1.0])[:, None, None, None] for s, y in enumerate(REFERENCE)]
    np.testing.assert_allclose(trajectory_error(latents, REFERENCE), [[0, 0], [0.1, 0], [0.2, 0]], atol=1e-12)
    np.testing.assert_allclose(trajectory_error(REFERENCE, REFERENCE), np.zeros((3, 2)))


def test_error_is_the_ratio_of_root_mean_squares():
    x = [y + RNG.standard_normal(y.shape) for y in REFERENCE]
    expected = [
        [np.sqrt(((a - b) ** 2).mean() / (b**2).mean()) for a, b in zip(xs, ys, strict=True)]
        for xs, ys in zip(x, REFERENCE, strict=True)
    ]
    np.testing.assert_allclose(trajectory_error(x, REFERENCE), expected)


@pytest.mark.parametrize(
    ("latents", "reference", "message"),
    [
        (REFERENCE[:2], REFERENCE, "equally many steps, found 2 and 3"),
        ([], [], "equally many steps, found 0"),
        ([REFERENCE[0], REFERENCE[1][:1]], REFERENCE[:2], "step 1: expected latents"),
        ([REFERENCE[0] * np.inf], REFERENCE[:1], "step 0: .*NaN or infinite"),
        ([REFERENCE[0]], [REFERENCE[0] * np.array([1, 0])[:, None, None, None]], "sample 1 are all zero"),
        (
            [x[: 2 - s] for s, x in enumerate(REFERENCE[:2])],
            [x[: 2 - s] for s, x in enumerate(REFERENCE[:2])],
            "number of samples changes",
        ),
    ],
)
def test_runs_that_do_not_compare_are_refused(latents, reference, message):
    with np.errstate(invalid="ignore"), pytest.raises(NumericsError, match=message):
        trajectory_error(latents, reference)
