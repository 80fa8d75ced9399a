"""Stable Diffusion against diffusers: the network from the same weights, the whole pipeline from the same folder, the
same noise in, the same latents after every step out, and the same picture.

Needs ``pip install 'mlxquant[diffusers]'``, after a CPU build of torch.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
from inspect import signature

import pytest

from mlxquant.models.unet.config import UNetConfig

from support.tiny_unet import CONFIGS
from support.unet_reference import CASES, differences

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.images,
    pytest.mark.filterwarnings("ignore"),  # of torch, diffusers and transformers
]


@pytest.mark.parametrize("case", CASES)
def test_what_is_computed_is_diffusers(tmp_path, case):
    found = differences(tmp_path, case)
    limits = {"prediction": 1e-5, "latents": 1e-4, "picture": 1e-3}
    assert found
    assert all(value < limits[name] for name, value in found.items()), found


def test_what_diffusers_says_of_a_unet_is_known():
    """Every option of its configuration, with its default."""
    model = pytest.importorskip("diffusers").UNet2DConditionModel.from_config(CONFIGS["1.5"])
    said = {name: list(value) if isinstance(value, tuple) else value for name, value in model.config.items()}
    assert len(said) >= 50
    assert UNetConfig.from_dict(said) == UNetConfig.from_dict(CONFIGS["1.5"])


def test_what_is_not_said_is_what_it_is_in_diffusers():
    usual = signature(pytest.importorskip("diffusers").UNet2DConditionModel.__init__).parameters
    for name, value in UNetConfig.from_dict({}).to_dict().items():
        default = usual[name].default
        expected = [*default] if isinstance(default, tuple) else default
        assert value == ([expected] * 4 if isinstance(value, list) and isinstance(expected, int) else expected), name
