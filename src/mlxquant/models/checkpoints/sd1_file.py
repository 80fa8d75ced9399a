"""Single files of Stable Diffusion 1: ``v1-5-pruned-emaonly.safetensors`` and the many that were made of it.

Their UNet counts the parts of all blocks in one row, ``input_blocks.0`` to ``output_blocks.11``. Averaged weights
beside it (``model_ema``), the numbers of positions and the schedule are not read.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from .comfyui_tokenizers import CLIP
from .compvis_autoencoder import autoencoder_config, autoencoder_tensors
from .single_file import Layout
from .source import Tensors
from .text_encoders import below, clip_config

PREFIX = "model.diffusion_model."
MARK = "input_blocks.0.0.weight"
TEXT = "cond_stage_model."
OPEN_CLIP, EMBEDDED_SIZES = TEXT + "model.", PREFIX + "label_emb."  # of Stable Diffusion 2, of SDXL
SCALING = 0.18215  # of latents
HEADS = 8  # of every attention
OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
PART = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.")
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def _fits(names: Collection[str]) -> bool:
    other = any(name.startswith((OPEN_CLIP, EMBEDDED_SIZES)) for name in names)
    return PREFIX + MARK in names and not other


def unet_tensors(arrays: Tensors) -> Tensors:
    """The tensors of UNet2DConditionModel, lazily.

    Raises:
        ValueError: They are of another UNet.
    """
    own = below(arrays, PREFIX)
    places = _places(own)
    found = Tensors()
    for name, value in own.items():
        part = PART.match(name)
        where = f"{part[1]}.{part[2]}.{part[3]}" if part else next((at for at in OUTSIDE if name.startswith(at)), None)
        if (where not in places and where not in OUTSIDE) or where is None:
            raise ValueError(f"{PREFIX}{name} is no part of the UNet of Stable Diffusion 1")
        at = OUTSIDE.get(where) or places[where]
        inside, _, kind = name.removeprefix(where + ".").rpartition(".")
        if ".resnets." in at:
            inside = RESNET[inside]
        elif at.endswith("samplers.0"):
            inside = "conv"
        found[f"{at}.{inside}.{kind}" if inside else f"{at}.{kind}"] = value
    if any(value.ndim != 4 for name, value in found.items() if name.endswith(".proj_in.weight")):
        raise ValueError(
            "Linears around attention, as Stable Diffusion 2 has them; take its folder in diffusers' layout"
        )
    return found


def _places(own: Tensors) -> dict[str, str]:
    """Where each part of the row of blocks is in diffusers' tree."""
    kinds: dict[str, dict[int, dict[int, str]]] = {"input_blocks": {}, "output_blocks": {}}
    for name in own:
        if match := PART.match(name):
            inside = name[match.end() :]
            kind = "samplers" if inside.startswith(("op.", "conv.")) else "resnets" if "_layers." in inside else ""
            kind = kind or ("attentions" if inside.startswith(("norm.", "proj", "transformer")) else "")
            if kind:
                kinds[match[1]].setdefault(int(match[2]), {})[int(match[3])] = kind
    found, level, count = dict[str, str](), 0, 0
    for number, parts in sorted(kinds["input_blocks"].items()):
        block = f"down_blocks.{level}"
        for part, kind in parts.items():
            at = f"{block}.downsamplers.0" if kind == "samplers" else f"{block}.{kind}.{count}"
            found[f"input_blocks.{number}.{part}"] = at
        level, count = (level + 1, 0) if "samplers" in parts.values() else (level, count + 1)
    level, count = 0, 0
    for number, parts in sorted(kinds["output_blocks"].items()):
        block = f"up_blocks.{level}"
        for part, kind in parts.items():
            at = f"{block}.upsamplers.0" if kind == "samplers" else f"{block}.{kind}.{count}"
            found[f"output_blocks.{number}.{part}"] = at
        level, count = (level + 1, 0) if "samplers" in parts.values() else (level, count + 1)
    return found


def unet_config(tensors: Tensors) -> dict[str, Any]:
    """The config.json of UNet2DConditionModel, from its tensors."""
    levels = len({name.split(".")[1] for name in tensors if name.startswith("down_blocks.")})
    resnets = {name.split(".")[3] for name in tensors if name.startswith("down_blocks.0.resnets.")}

    def types(side: str) -> list[str]:
        crossed = [any(name.startswith(f"{side}_blocks.{i}.attentions.") for name in tensors) for i in range(levels)]
        return [f"{'CrossAttn' * one}{side.capitalize()}Block2D" for one in crossed]

    keys = next(value for name, value in tensors.items() if name.endswith(".attn2.to_k.weight"))
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": tensors["conv_in.weight"].shape[1],
        "out_channels": tensors["conv_out.weight"].shape[0],
        "block_out_channels": [tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)],
        "down_block_types": types("down"),
        "up_block_types": types("up"),
        "layers_per_block": len(resnets),
        "cross_attention_dim": keys.shape[1],
        "attention_head_dim": HEADS,
    }


def _clip_tensors(arrays: Tensors) -> Tensors:
    found = below(arrays, TEXT + "transformer.")
    return {name: value for name, value in found.items() if not name.endswith(".position_ids")}


SD1_FILE = Layout(
    pipeline="StableDiffusionPipeline",
    title="Stable Diffusion 1 (input_blocks)",
    fits=_fits,
    tensors={"unet": unet_tensors, "vae": autoencoder_tensors, "text_encoder": _clip_tensors},
    configs={
        "unet": unet_config,
        "vae": lambda tensors: autoencoder_config(tensors, SCALING, None),
        "text_encoder": lambda tensors: clip_config(tensors, "quick_gelu"),
    },
    components=("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    scheduler=SCHEDULER,
    repository=lambda config: "stable-diffusion-v1-5/stable-diffusion-v1-5",
    original=lambda names: ("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors"),
    denoiser="unet",
    tokenizers={"tokenizer": CLIP},
)
