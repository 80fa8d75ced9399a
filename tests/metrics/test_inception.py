"""Inception on random weights; its equality with the public network is tested in ``public``."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError, NumericsError
from mlxquant.metrics import inception

from support.random_weights import random_tensors


@pytest.fixture(scope="module")
def network():
    return inception.Inception(
        {name: mx.array(value) for name, value in random_tensors(inception.shapes()).items()}, "some/weights.pth"
    )


def test_features_of_a_picture_of_any_size(network):
    images = np.random.default_rng(0).random((2, 40, 64, 3))
    found = network(images)
    assert found.shape == (2, inception.WIDTH)
    assert np.isfinite(found).all()
    assert found.std() > 0
    np.testing.assert_allclose(network(images[1:])[0], found[1], rtol=1e-4, atol=1e-4)


def test_only_published_weights_say_so(network):
    assert not network.published
    assert network.title == "Inception-v3 (weights.pth)"


def test_size_of_the_published_network():
    """torchvision's has 23 834 568 parameters without the auxiliary classifier, of which 2 049 000 are in the last
    layer.
    """
    shapes = inception.shapes()
    count = sum(int(np.prod(shape)) for name, shape in shapes.items() if "running" not in name)
    assert count == 23_834_568 - 2_049_000
    assert len([name for name in shapes if name.endswith("conv.weight")]) == 94


def test_bad_input_is_refused(network):
    with pytest.raises(NumericsError, match="divide bytes by 255"):
        network(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ArtifactError, match=r"x.pth: 470 of 470 tensors are missing"):
        inception.Inception({}, "x.pth")
