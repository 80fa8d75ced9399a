"""A quantized model computes the same on every device.

On the CPU the test compares the CPU with itself, which tests the test. The other side is Metal's, and nobody has run it
there yet.
"""

from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.metrics.psnr import psnr

PROMPT = mq.Prompt(7, "a large red circle at left on white background")
DEVICES = [mx.cpu, pytest.param(mx.gpu, marks=pytest.mark.metal)]


@contextmanager
def default(device):
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        yield
    finally:
        mx.set_default_device(before)


@pytest.fixture(scope="module")
def quantized(embedded):
    """A model of each kind of layer, made on the CPU."""
    with default(mx.cpu):
        calibration = mq.calibrate(embedded, prompts=2, steps=2, seed=0)
        return {name: mq.quantize(embedded, calibration, name) for name in ("rtn-w4a8", "rtn-w4a16-g64")}


@pytest.mark.parametrize("recipe", ["rtn-w4a8", "rtn-w4a16-g64"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_picture_is_the_same(quantized, recipe, device):
    """To 40 dB: sums of floats in another order round some inputs to the neighbouring code."""
    with default(mx.cpu):
        expected = np.array(quantized[recipe].images([PROMPT], steps=2))
    with default(device):
        found = np.array(quantized[recipe].images([PROMPT], steps=2))
    assert psnr(found, expected)[0] > 40
