"""Single files of Stable Diffusion 1, as CompVis names their tensors: written from what diffusers names, by rules of
their own, so that reading them back is a test.
"""

import re

import mlx.core as mx

from support.original_files import original_autoencoder
from support.tiny_unet import in_torch, random_unet

CONFIG = {  # of the widths and heads that such files always have
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
DEEP = {
    **CONFIG,
    "block_out_channels": [32, 32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_unet(tensors, said):
    """The UNet of a single file, from its tensors in diffusers."""
    layers, found = said["layers_per_block"], {}
    for name, value in tensors.items():
        place, _, kind = name.rpartition(".")
        if place in OUTSIDE:
            found[f"{OUTSIDE[place]}.{kind}"] = value
            continue
        block, part, index, *inside = re.sub(r"^(down|up)_blocks\.(\d+)", r"\1_blocks\2", place).split(".")
        inside = ".".join(inside)
        if part == "resnets":
            inside = RESNET[inside]
        index = int(index)
        if block == "mid_block":
            where = f"middle_block.{1 if part == 'attentions' else 2 * index}"
        else:
            side, level = block.split("_blocks")
            level = int(level)
            if side == "down":
                number = 1 + level * (layers + 1) + (layers if part == "downsamplers" else index)
                inside = inside.replace("conv", "op") if part == "downsamplers" else inside
                where = f"input_blocks.{number}.{int(part == 'attentions')}"
            else:
                number = level * (layers + 1) + (layers if part == "upsamplers" else index)
                after = 1 + ("CrossAttn" in said["up_block_types"][level]) if part == "upsamplers" else 0
                where = f"output_blocks.{number}.{after or int(part == 'attentions')}"
        found[f"{where}.{inside}.{kind}"] = value
    return {f"model.diffusion_model.{name}": value for name, value in found.items()}


def original_clip(tensors):
    """CLIP-L's tensors in a single file."""
    found = {f"cond_stage_model.transformer.{name}": mx.array(value) for name, value in tensors.items()}
    return found | {"cond_stage_model.transformer.text_model.embeddings.position_ids": mx.arange(77)[None]}


def write_sd1_file(path, said=CONFIG, clip=None, **more):
    """A single file of Stable Diffusion 1 with a random UNet of a configuration, a small autoencoder, ``clip`` and
    ``more`` tensors; returns the UNet.
    """
    model = random_unet(said)
    tensors = {**original_unet(in_torch(model), said), **original_autoencoder(4, quant=True)}
    averaged = {"model_ema.decay": mx.array(0.9), "model_ema.num_updates": mx.array(3), "betas": mx.ones(1000)}
    mx.save_safetensors(str(path), {**tensors, **averaged, **original_clip(clip or {}), **more})
    return model
