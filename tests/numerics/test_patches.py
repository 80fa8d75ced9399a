"""Patches: times the flattened kernel they are what MLX's convolutions write, and for reference what a loop in float64
reads.
"""

import itertools

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.numerics.patches import Window, patches, spread_evenly

PLAIN = {1: mx.conv1d, 2: mx.conv2d, 3: mx.conv3d}
TRANSPOSED = {1: mx.conv_transpose1d, 2: mx.conv_transpose2d, 3: mx.conv_transpose3d}
SIZE, PLACES = (3, 2, 2), (7, 6, 5)


def arrays(dims, groups=1, channels=4, out=6):
    rng = np.random.default_rng(dims)
    x = rng.normal(size=(2, *PLACES[:dims], channels)).astype(np.float32)
    kernel = rng.normal(size=(out, *SIZE[:dims], channels // groups)).astype(np.float32)
    return mx.array(x), mx.array(kernel)


def multiplied(rows, kernel, groups):
    """Patches times a kernel, in float64."""
    flat = np.array(kernel, np.float64).reshape(groups, kernel.shape[0] // groups, -1)
    y = np.einsum("...gk,gok->...go", np.array(rows, np.float64), flat)
    return y.reshape(*y.shape[:-2], -1)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_patches_times_the_kernel_are_the_convolution(dims):
    for stride, padding, dilation, groups in itertools.product((1, 2), (0, 2), (1, 2), (1, 2, 4) if dims < 3 else (1,)):
        x, kernel = arrays(dims, groups, out=8)
        window = Window.of(kernel.shape[1:-1], stride, padding, dilation, groups)
        y = PLAIN[dims](x, kernel, stride, padding, dilation, groups)
        rows = patches(x, window)
        assert window.positions(x.shape[1:-1]) == y.shape[1:-1] == rows.shape[1 : 1 + dims]
        np.testing.assert_allclose(multiplied(rows, kernel, groups), np.array(y), atol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_of_transposed_convolutions_too(dims):
    """Also where padding is wider than the kernel reaches, which cuts the input."""
    for stride, padding, dilation, more in itertools.product((1, 2, 3), (0, 1, 2), (1, 2), (0, 1)):
        x, kernel = arrays(dims)
        window = Window.transposed(kernel.shape[1:-1], stride, padding, dilation, more)
        y = TRANSPOSED[dims](x, kernel, stride, padding, dilation, more)
        rows = patches(x, window)
        assert rows.shape[1 : 1 + dims] == y.shape[1:-1], (stride, padding, dilation, more)
        np.testing.assert_allclose(multiplied(rows, kernel, 1), np.array(y), atol=1e-5)


def test_options_may_differ_by_place():
    x, kernel = arrays(2)
    y = mx.conv2d(x, kernel, (2, 1), (0, 2), (1, 2))
    rows = patches(x, Window.of(kernel.shape[1:-1], (2, 1), (0, 2), (1, 2)))
    np.testing.assert_allclose(multiplied(rows, kernel, 1), np.array(y), atol=1e-5)


@pytest.mark.parametrize("window", [Window.of((3, 2), 2, 1, groups=2), Window.transposed((3, 2), 2, 1)])
def test_some_outputs_are_those_of_all(window):
    x, _ = arrays(2)
    every = patches(x, window)
    count = int(np.prod(every.shape[1:3]))
    some = spread_evenly(count, 5)
    assert some.tolist() == sorted({*some.tolist()})
    assert (some[0], some[-1]) == (0, count - 1)
    flat = np.array(every).reshape(2, count, *every.shape[3:])
    np.testing.assert_array_equal(np.array(patches(x, window, some)), flat[:, some])
    assert spread_evenly(3, 9).tolist() == [0, 1, 2]


def test_a_patch_is_what_stands_under_the_kernel():
    x, _ = arrays(2)
    rows = np.array(patches(x, Window.of((3, 2), 1, 1)))
    padded = np.pad(np.array(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    np.testing.assert_array_equal(rows[1, 2, 3, 0], padded[1, 2:5, 3:5].ravel())
