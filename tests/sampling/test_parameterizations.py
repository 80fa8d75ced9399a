"""What models predict: four kinds that say the same, at any level."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.sampling.parameterizations import KINDS, Parameterization, mixture

LEVELS = [(1 - s, s) for s in (0.02, 0.5, 0.99)] + [(np.cos(a), np.sin(a)) for a in (0.05, 0.8, 1.5)]


def image_and_noise():
    return np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_every_kind_gives_every_other(kind, other, alpha, sigma):
    image, noise = image_and_noise()
    latent, one = alpha * image + sigma * noise, Parameterization(kind)
    prediction = one.target(image, noise, alpha, sigma)
    found = one.convert(prediction, latent, alpha, sigma, other)
    np.testing.assert_allclose(found, Parameterization(other).target(image, noise, alpha, sigma), atol=1e-11)
    np.testing.assert_allclose(
        Parameterization(other).convert(found, latent, alpha, sigma, kind), prediction, atol=1e-10
    )


def test_the_kinds_are_those_of_the_papers():
    alpha, sigma = 0.8, 0.6
    assert mixture("flow", alpha, sigma) == (-1, 1)
    assert mixture("epsilon", alpha, sigma) == (0, 1)
    assert mixture("v", alpha, sigma) == (-0.6, 0.8)
    assert mixture("sample", alpha, sigma) == (1, 0)


def test_a_prediction_of_the_kind_asked_for_is_the_very_same_array():
    prediction = mx.ones((1, 2))
    for kind in KINDS:
        assert Parameterization(kind).convert(prediction, mx.zeros((1, 2)), 0.3, 0.7, kind) is prediction


@pytest.mark.parametrize(("kind", "alpha", "sigma"), [("epsilon", 0.0, 1.0), ("sample", 1.0, 0.0)])
def test_what_the_latent_says_already_gives_nothing_else(kind, alpha, sigma):
    with pytest.raises(AdapterError, match=f"predicts '{kind}' says nothing new"):
        Parameterization(kind).weights("v", alpha, sigma)


def test_learned_variance_is_the_second_half_of_the_channels():
    output = mx.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(Parameterization("epsilon", True).prediction(output), output[..., :2])
    assert Parameterization("epsilon").prediction(output) is output
    with pytest.raises(AdapterError, match="even number of channels, found 3"):
        Parameterization("epsilon", True).prediction(mx.zeros((2, 3)))


def test_an_unknown_kind_is_refused():
    with pytest.raises(AdapterError, match="predict 'x0'; expected one of flow, epsilon, v, sample"):
        Parameterization("x0")
