"""The public implementations of the metrics, in PyTorch, SciPy and scikit-image, on random weights.

Without the packages these tests are skipped, and where MLXQUANT_REQUIRE_METRICS is set they fail. torch and torchvision
have to be of one build: the registry's torchvision does not run beside a CPU build of torch.
"""

import os
import warnings
from importlib import import_module
from types import SimpleNamespace

import pytest

PACKAGES = (
    "torch",
    "torchvision",
    "lpips",
    "pytorch_fid.inception",
    "scipy.linalg",
    "skimage.metrics",
    "tokenizers",
    "transformers",
)


@pytest.fixture(scope="package", autouse=True)
def public():
    """The packages, by the last part of their names."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            return SimpleNamespace(**{name.split(".")[-1]: import_module(name) for name in PACKAGES})
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another build
        refuse = pytest.fail if os.environ.get("MLXQUANT_REQUIRE_METRICS") else pytest.skip
        refuse(f"a public implementation does not import ({error}); pip install 'mlxquant[metrics]'")
