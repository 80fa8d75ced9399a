"""What a UNet's configuration may say: what is not supported is refused, and nothing is ignored."""

import json

import pytest

from mlxquant.errors import AdapterError
from mlxquant.models.unet.config import SD15, UNetConfig

from support.tiny_unet import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_plain_data_and_back(name):
    config = UNetConfig.from_dict(CONFIGS[name])
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_numbers_are_given_once_or_for_each_block():
    one, each = ({**CONFIGS["1.5"], "attention_head_dim": count} for count in (2, [2, 2]))
    assert UNetConfig.from_dict(one) == UNetConfig.from_dict(each)
    text = {**CONFIGS["1.5"], "cross_attention_dim": [32, 32]}
    assert UNetConfig.from_dict(text) == UNetConfig.from_dict(CONFIGS["1.5"])


def test_what_it_reads_is_the_first_of_all_that_there_are():
    assert SD15.attention_head_dim == (8, 8, 8, 8)
    assert UNetConfig.from_dict(SD15.to_dict()) == SD15


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("class_embed_type", "timestep", "class_embed_type 'timestep' is not supported; expected None"),
        ("addition_embed_type", "text_time", "addition_embed_type 'text_time' is not supported"),
        ("time_cond_proj_dim", 256, "time_cond_proj_dim 256 is not supported"),
        ("mid_block_type", None, "mid_block_type None is not supported; expected 'UNetMidBlock2DCrossAttn'"),
        ("act_fn", "gelu", "act_fn 'gelu' is not supported; expected 'silu' or 'swish'"),
        ("downsample_padding", 0, "downsample_padding 0 is not supported; expected 1"),
        ("only_cross_attention", True, "only_cross_attention True is not supported; expected False"),
        ("resnet_time_scale_shift", "scale_shift", "resnet_time_scale_shift 'scale_shift' is not supported"),
        ("attention_type", "gated", "attention_type 'gated' is not supported; expected 'default'"),
        ("num_attention_heads", 8, "num_attention_heads 8 is not supported; expected None"),
        ("warp", 9, "a UNet has no option 'warp'; expected some of sample_size"),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"], r"down_block_types\[0\] is 'AttnDownBlock2D'"),
        ("transformer_layers_per_block", [[1], [1]], "transformer_layers_per_block"),
        ("norm_num_groups", None, "norm_num_groups is null"),
        ("norm_num_groups", 5, "16 channels cannot be normed in 5 groups"),
        ("attention_head_dim", 3, "16 channels and 3 heads in one block"),
        ("attention_head_dim", [2], "attention_head_dim has 1 entries for 2 blocks"),
        ("cross_attention_dim", [24, 32], r"cross_attention_dim \[24, 32\] differs by block"),
        ("block_out_channels", [], "block_out_channels has 0 entries"),
    ],
)
def test_what_is_not_supported_is_refused(option, value, message):
    with pytest.raises(AdapterError, match=f"unet/config.json: .*{message}"):
        UNetConfig.from_dict({**CONFIGS["1.5"], option: value}, "unet/config.json")
