"""What a PixArt's transformer/config.json may say: every option is read, has one value, or changes nothing; else it is
an error.
"""

from dataclasses import fields

import pytest

from mlxquant.errors import AdapterError
from mlxquant.layers.tree import parameters
from mlxquant.models.pixart.config import FIXED, IDLE, READ, PixArtConfig
from mlxquant.models.pixart.network import PixArt

from support.pixart import SMALL, small_config

HUB = {  # transformer/config.json of the folder for 1024 pixels, as diffusers 0.22 wrote it
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.22.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 128,
    "upcast_attention": False,
    "use_linear_projection": False,
}


def test_the_real_ones():
    large = PixArtConfig.from_config(HUB)
    assert large == PixArtConfig()
    assert (large.width, large.interpolation_scale, large.use_additional_conditions) == (1152, 2, True)
    small = PixArtConfig.from_config(HUB | {"sample_size": 64})
    assert (small.interpolation_scale, small.use_additional_conditions) == (1, False)
    sigma = PixArtConfig.from_config(HUB | {"use_additional_conditions": False, "interpolation_scale": None})
    assert (sigma.interpolation_scale, sigma.use_additional_conditions) == (2, False)
    assert large.learned_variance
    assert not PixArtConfig.from_config(HUB | {"out_channels": None}).learned_variance


def test_the_real_size():
    """As many parameters as diffusers has, counted there; nothing is allocated. The paper says 0.6 billion."""
    for side, size, count in ((64, 610_856_096, 603), (128, 611_349_152, 611)):
        found = parameters(PixArt(PixArtConfig(sample_size=side)))
        assert (sum(value.size for value in found.values()), len(found)) == (size, count)


def test_plain_data_is_read_again():
    for config in (PixArtConfig(), PixArtConfig.from_config(small_config("sigma"))):
        assert PixArtConfig.from_config(config.to_dict()) == config


def test_every_option_is_known_once():
    assert set(READ) == {one.name for one in fields(PixArtConfig)}
    assert len({*READ, *FIXED, *IDLE}) == len(READ) + len(FIXED) + len(IDLE)
    assert set(HUB) - {"_class_name", "_diffusers_version", "cross_attention_dim"} <= {*READ, *FIXED, *IDLE}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "DiTTransformer2DModel"}, "_class_name is 'DiTTransformer2DModel', expected PixArtTransf"),
        ({"activation_fn": "geglu"}, "activation_fn 'geglu' is not supported; expected 'gelu-approximate'"),
        ({"norm_type": "layer_norm"}, "norm_type 'layer_norm' is not supported"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine True is not supported"),
        ({"num_vector_embeds": 12}, "num_vector_embeds 12 is not supported; expected None"),
        ({"only_cross_attention": True}, "only_cross_attention True is not supported"),
        ({"rope": True}, "unknown option 'rope'; expected some of num_attention_heads"),
        ({"num_layers": 0}, "num_layers is 0, expected a whole number from 1"),
        ({"num_layers": None}, "num_layers is null"),
        ({"caption_channels": None}, "caption_channels is null"),
        ({"cross_attention_dim": 32}, "cross_attention_dim is 32, but captions are projected to the 24 channels"),
        ({"cross_attention_dim": None}, "cross_attention_dim is None, but captions"),
        ({"attention_head_dim": 5, "cross_attention_dim": 10}, "2 heads of 5 channels are 10 in all; expected a mult"),
        (
            {"attention_head_dim": 8, "cross_attention_dim": 16, "sample_size": 128},
            "16 in all; expected a multiple of 12",
        ),
        ({"use_additional_conditions": True}, "use_additional_conditions with sample_size 8"),
        ({"patch_size": 3}, "sample_size 8 is no multiple of patch_size 3"),
    ],
)
def test_what_cannot_be_built_is_an_error_that_names_it(change, message):
    with pytest.raises(AdapterError, match=message) as caught:
        PixArtConfig.from_config(SMALL | change, "FOLDER: transformer/config.json")
    assert str(caught.value).startswith("FOLDER: transformer/config.json: ")


def test_captions_have_to_be_projected():
    with pytest.raises(AdapterError, match="has no 'caption_channels'"):
        PixArtConfig.from_config({name: value for name, value in SMALL.items() if name != "caption_channels"})
