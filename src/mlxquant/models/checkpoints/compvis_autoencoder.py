"""The autoencoder of an original single file: CompVis' names, as diffusers' AutoencoderKL has them, and its config.

CompVis counts the decoder's levels from the largest picture, diffusers in running order.
"""

from __future__ import annotations

import re
from typing import Any

from .source import Tensors

PREFIX = "first_stage_model."
GROUPS = 32  # of every norm
RENAMED = (
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
)
LEVEL = re.compile(r"^decoder\.up_blocks\.(\d+)\.")


def autoencoder_tensors(arrays: Tensors) -> Tensors:
    """The autoencoder's tensors under diffusers' names; empty where the file has none."""
    found = Tensors()
    for name, value in arrays.items():
        if not name.startswith(PREFIX):
            continue
        new = name.removeprefix(PREFIX)
        for pattern, becomes in RENAMED:
            new = re.sub(pattern, becomes, new)
        if ".attentions.0.to_" in new and value.ndim == 4:  # a convolution of one pixel
            value = value[:, :, 0, 0]
        found[new] = value
    levels = 1 + max((int(match[1]) for name in found if (match := LEVEL.match(name))), default=-1)
    return {
        LEVEL.sub(lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name): value
        for name, value in found.items()
    }


def autoencoder_config(tensors: Tensors, scaling: float, shift: float | None) -> dict[str, Any]:
    """The config.json of an autoencoder.

    Args:
        tensors: As ``autoencoder_tensors`` gives them.
        scaling: What latents are multiplied with.
        shift: What is taken from them before; None for nothing.
    """
    levels = len({name.split(".")[2] for name in tensors if name.startswith("encoder.down_blocks.")})
    layers = len({name.split(".")[4] for name in tensors if name.startswith("encoder.down_blocks.0.resnets.")})
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [
            tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)
        ],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "act_fn": "silu",
        "norm_num_groups": GROUPS,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in tensors,
    }
