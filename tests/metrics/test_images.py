"""Pictures that a metric would misread are refused, and resizing neither rounds nor aliases."""

import numpy as np
import pytest
from PIL import Image

from mlxquant.errors import NumericsError
from mlxquant.metrics.images import checked, eight_bits, largest_square, resized, shortest_side

IMAGES = np.random.default_rng(0).random((2, 6, 9, 3)).astype(np.float32)


def test_good_pictures_pass_as_they_are():
    assert checked(IMAGES, "psnr") is IMAGES
    checked(np.full((1, 2, 2, 3), 1.00001), "psnr")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[0], r"expected pictures \[B,H,W,3\], found \(6, 9, 3\)"),
        (IMAGES[..., :1], r"\[B,H,W,3\]"),
        (IMAGES[:0], r"\[B,H,W,3\]"),
        ((IMAGES * 255).astype(np.uint8), "divide bytes by 255"),
        (IMAGES * 255, r"in \[0,1\], found values from"),
        (IMAGES * 2 - 1, r"in \[0,1\]"),
        (np.where(IMAGES > 0.5, np.nan, IMAGES), "NaN or infinite"),
        (np.where(IMAGES > 0.5, -np.inf, IMAGES), "NaN or infinite"),
    ],
)
def test_others_are_refused(images, message):
    with pytest.raises(NumericsError, match=f"psnr: .*{message}"):
        checked(images, "psnr")


def test_resizing_is_not_rounded_to_bytes_and_antialiases():
    image = np.zeros((64, 64, 3))
    image[::2] = 1 / 1024  # lost in bytes; a filter that samples without averaging sees all of it or nothing
    small = resized(image, (8, 12))
    assert small.shape == (8, 12, 3)
    assert small.dtype == np.float32
    np.testing.assert_allclose(small, image.mean(), rtol=0.05)


def test_resizing_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(resized(IMAGES[0], (6, 9)), IMAGES[0])


def test_bytes_are_rounded_to_the_nearest():
    np.testing.assert_array_equal(np.asarray(eight_bits(np.full((1, 1, 3), 0.4999 / 255))), 0)
    np.testing.assert_array_equal(np.asarray(eight_bits(np.full((1, 1, 3), 0.5001 / 255))), 1)


@pytest.mark.parametrize("crop", [shortest_side, largest_square])
@pytest.mark.parametrize("size", [(30, 20), (20, 30), (10, 10)])
def test_crops_keep_the_centre(crop, size):
    image = Image.new("L", size, 0)
    image.paste(255, (size[0] // 2 - 2, size[1] // 2 - 2, size[0] // 2 + 2, size[1] // 2 + 2))
    found = np.asarray(crop(image, 20)).astype(float)
    assert found.shape == (20, 20)
    y, x = (found.sum(axis=axis) @ np.arange(20) / found.sum() for axis in (1, 0))
    assert abs(y - 9.5) < 0.6
    assert abs(x - 9.5) < 0.6
