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


SMALL = lpips.Trunk(  # two slices, the second behind a maximum
    lpips.ALEX.weights, "", ((lpips.TrunkLayer(0, 3, 4, 3, 2, 1),), (lpips.TrunkLayer(3, 4, 5),)), (0, 3), 9
)


def convolved(x, weight, bias, stride, padding):
    """A rectified convolution of one picture [H,W,I] with a kernel [O,I,h,w], a place at a time."""
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    side = weight.shape[2]
    places = [range(0, size - side + 1, stride) for size in x.shape[:2]]
    windows = np.array([[x[i : i + side, j : j + side] for j in places[1]] for i in places[0]])
    return np.maximum(np.einsum("ijhwc,ochw->ijo", windows, weight) + bias, 0)


def by_hand(image, reference, arrays):
    """Equation 1 of the paper, in float64, with the scaling of the lpips package."""
    total, slices = 0.0, []
    for picture in (image, reference):
        x = (picture.astype(np.float64) * 2 - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        first = convolved(x, arrays["net.slice1.0.weight"], arrays["net.slice1.0.bias"], 2, 1)
        height, width = ((size - 3) // 2 + 1 for size in first.shape[:2])
        pooled = [
            [first[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1)) for j in range(width)] for i in range(height)
        ]
        second = convolved(np.array(pooled), arrays["net.slice2.3.weight"], arrays["net.slice2.3.bias"], 1, 1)
        slices.append([f / (np.linalg.norm(f, axis=-1, keepdims=True) + 1e-10) for f in (first, second)])
    for index, (a, b) in enumerate(zip(*slices, strict=True)):
        total += (np.square(a - b) @ arrays[f"lin{index}.model.1.weight"].reshape(-1)).mean()
    return total


def test_it_is_the_papers_equation():
    rng = np.random.default_rng(1)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in lpips.shapes(SMALL).items()}
    network = lpips.Lpips(SMALL, {name: mx.array(value) for name, value in arrays.items()}, "test")
    pictures, others = IMAGES[:, :21, :17], np.clip(IMAGES + 0.2 * NOISE, 0, 1)[:, :21, :17]
    expected = [by_hand(one, other, arrays) for one, other in zip(pictures, others, strict=True)]
    np.testing.assert_allclose(network(pictures, others), expected, rtol=1e-4)


def test_where_nothing_is_seen_nothing_differs():
    arrays = {name: mx.ones(shape) for name, shape in lpips.shapes(SMALL).items()}
    blind = arrays | {name: value - 1000 for name, value in arrays.items() if name.endswith("bias")}
    np.testing.assert_array_equal(lpips.Lpips(SMALL, blind, "test")(IMAGES, 1 - IMAGES), 0)
