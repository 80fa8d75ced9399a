"""The UNet against diffusers' UNet2DConditionModel: the same weights, the same predictions.

Needs ``pip install 'mlxquant[diffusers]'``, after a CPU build of torch.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
from inspect import signature

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.models.parts.loading import fill
from mlxquant.models.unet.chain import unet_stages
from mlxquant.models.unet.config import UNetConfig
from mlxquant.models.unet.network import UNet

from support.tiny_unet import CONFIGS

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch's tensors in NumPy 2
]


def diffusers_unet():
    return pytest.importorskip("diffusers").UNet2DConditionModel


def theirs(config):
    """diffusers' UNet with random weights, of norms, too."""
    torch = pytest.importorskip("torch")
    model = diffusers_unet().from_config(config).eval()
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if value.ndim == 1:
            torch.nn.init.normal_(value, float("norm" in name and name.endswith("weight")), 0.2)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(8, 8), (12, 8), (7, 9)])
def test_the_prediction_is_diffusers(name, size):
    other, model = theirs(CONFIGS[name]), UNet(UNetConfig.from_dict(CONFIGS[name]))
    import torch

    fill(model, {key: mx.array(x.numpy()) for key, x in other.state_dict().items()}, mx.float32, "the test")
    rng = np.random.default_rng(0)
    shapes = (2, *size, 4), (2, 7, CONFIGS[name]["cross_attention_dim"])
    latent, text = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    t = np.array([3.0, 901.0], np.float32)  # a batch of different times
    with torch.no_grad():
        expected = other(*map(torch.from_numpy, (latent.transpose(0, 3, 1, 2).copy(), t, text))).sample.numpy()
    state = {"latent": mx.array(latent), "t": mx.array(t), "text": mx.array(text)}
    for stage in unet_stages(model):
        state = stage.run(state)
    assert list(state) == ["velocity"]
    np.testing.assert_allclose(np.array(state["velocity"]), expected.transpose(0, 2, 3, 1), atol=1e-5)


def test_what_diffusers_says_of_a_unet_is_known():
    """Every option of its configuration, with its default."""
    model = theirs(CONFIGS["1.5"])
    said = {name: list(value) if isinstance(value, tuple) else value for name, value in model.config.items()}
    assert len(said) >= 50
    assert UNetConfig.from_dict(said) == UNetConfig.from_dict(CONFIGS["1.5"])


def test_what_is_not_said_is_what_it_is_in_diffusers():
    usual = {name: one.default for name, one in signature(diffusers_unet().__init__).parameters.items()}
    ours = UNetConfig.from_dict({}).to_dict()
    for name, value in ours.items():
        expected = [*usual[name]] if isinstance(usual[name], tuple) else usual[name]
        assert value == ([expected] * 4 if isinstance(value, list) and isinstance(expected, int) else expected), name
