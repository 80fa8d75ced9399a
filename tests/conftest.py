"""Shared models: the embedded one, and a tiny one of the same kind with random weights for tests that only need the
machinery.
"""

import os
from importlib.util import find_spec

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import pytest

from support.tiny_pictures import tiny_adapter


def pytest_runtest_setup(item):
    """Without mlx-lm tests that need it are skipped, and where MLXQUANT_REQUIRE_MLXLM is set they fail."""
    if item.get_closest_marker("mlxlm") and find_spec("mlx_lm") is None:
        refuse = pytest.fail if os.environ.get("MLXQUANT_REQUIRE_MLXLM") else pytest.skip
        refuse("mlx-lm is not installed")


@pytest.fixture
def tiny():
    return mq.Model(tiny_adapter())


@pytest.fixture(scope="session")
def embedded():
    return mq.load("mmdit-shapes")
