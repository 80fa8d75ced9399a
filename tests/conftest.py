"""Shared models: the embedded one, and a tiny one of the same kind with random weights for tests that only need the
machinery.
"""

import os
from importlib.util import find_spec

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import pytest

from support.chromium import CHROMIUM
from support.tiny_pictures import tiny_adapter

NEEDED = {  # by marker: whether it is here, and what is said where it is not
    "mlxlm": (find_spec("mlx_lm") is not None, "mlx-lm is not installed"),
    "mflux": (find_spec("mflux") is not None, "mflux is not installed: pip install --no-deps mflux==0.24.0"),
    "onnx": (
        all(map(find_spec, ("onnx", "onnxruntime", "terrain_diffusion"))),
        "adaptive-terrain-diffusion or onnx is not installed",
    ),
    "diffusers": (find_spec("diffusers") and find_spec("torch"), "diffusers or torch is not installed"),
    "images": (
        all(map(find_spec, ("tokenizers", "sentencepiece"))),
        "tokenizers or sentencepiece is not installed: pip install 'mlxquant[images]'",
    ),
    "metal": (mx.metal.is_available(), "Metal is not available"),
    "browser": (CHROMIUM is not None, "Chromium is not installed"),
}


def pytest_runtest_setup(item):
    """Without what a test needs it is skipped, and where MLXQUANT_REQUIRE_MLXLM is set, or one of another marker, it
    fails.
    """
    for marker, (here, why) in NEEDED.items():
        if item.get_closest_marker(marker) and not here:
            refuse = pytest.fail if os.environ.get(f"MLXQUANT_REQUIRE_{marker.upper()}") else pytest.skip
            refuse(why)


@pytest.fixture
def tiny():
    return mq.Model(tiny_adapter())


@pytest.fixture(scope="session")
def embedded():
    return mq.load("mmdit-shapes")
