"""LPIPS on random weights; its equality with the public network is tested in ``public``."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError, NumericsError
from mlxquant.metrics import lpips

from support.random_weights import random_tensors

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 40, 33, 3)).astype(np.float32)
NOISE = RNG.standard_normal(IMAGES.shape)


@pytest.fixture(scope="module", params=["ALEX", "VGG"])
def network(request):
    trunk = getattr(lpips, request.param)
    return lpips.Lpips(
        trunk, {name: mx.array(value) for name, value in random_tensors(lpips.shapes(trunk)).items()}, "test"
    )


def test_distance_grows_from_nothing(network):
    found = [network(IMAGES, np.clip(IMAGES + scale * NOISE, 0, 1)) for scale in (0, 0.05, 0.3)]
    np.testing.assert_array_equal(found[0], 0)
    assert (found[1] > 0).all()
    assert (found[1] < found[2]).all()


def test_pairs_do_not_depend_on_their_batch(network, monkeypatch):
    reference = np.clip(IMAGES + 0.2 * NOISE, 0, 1)
    together = network(IMAGES, reference)
    monkeypatch.setattr(lpips, "PIXELS", 1)
    np.testing.assert_allclose(network(IMAGES, reference), together, rtol=1e-5)
    np.testing.assert_allclose(network(reference, IMAGES), together, rtol=1e-5)


def test_black_pictures_have_a_distance(network):
    black = np.zeros_like(IMAGES)
    np.testing.assert_array_equal(network(black, black), 0)
    assert np.isfinite(network(black, IMAGES)).all()


def test_the_smallest_picture(network):
    side = network._trunk.smallest
    assert np.isfinite(network(IMAGES[:, :side, :side], np.zeros((3, side, side, 3)))).all()
    small = np.zeros((1, side - 1, 64, 3))
    with pytest.raises(NumericsError, match=f"too small for .*, it takes {side}"):
        network(small, small)


def test_another_networks_file_is_refused():
    tensors = {name: mx.array(value) for name, value in random_tensors(lpips.shapes(lpips.ALEX)).items()}
    with pytest.raises(ArtifactError, match=r"a.safetensors: .* tensors are missing, such as lin0"):
        lpips.Lpips(
            lpips.ALEX, {name: value for name, value in tensors.items() if not name.startswith("lin")}, "a.safetensors"
        )
    with pytest.raises(
        ArtifactError, match=r"net.slice1.0.weight has shape \(64, 3, 3, 5\), expected \(64, 3, 11, 11\)"
    ):
        lpips.Lpips(lpips.ALEX, tensors | {"net.slice1.0.weight": mx.zeros((64, 3, 3, 5))}, "a.safetensors")


def test_sizes_of_the_published_networks():
    """2 469 696 and 14 714 688 parameters in torchvision's features, 1152 and 1472 in the heads."""
    for trunk, count in ((lpips.ALEX, 2_469_696 + 1152), (lpips.VGG, 14_714_688 + 1472)):
        assert sum(int(np.prod(shape)) for shape in lpips.shapes(trunk).values()) == count
