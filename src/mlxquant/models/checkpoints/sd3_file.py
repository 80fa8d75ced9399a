"""Single files of Stable Diffusion 3 and 3.5: ``sd3_medium*.safetensors``, ``sd3.5_*.safetensors``, with or without
text encoders.

Their transformer joins queries, keys and values in one Linear, and writes shift before scale everywhere, which
diffusers turns in two places.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx

from .comfyui_tokenizers import CLIP, T5
from .compvis_autoencoder import PREFIX as AUTOENCODER
from .compvis_autoencoder import autoencoder_config, autoencoder_tensors
from .loose_files import LooseKind
from .single_file import Layout
from .source import Tensors
from .text_encoders import (
    CLIP_WORDS,
    PROJECTION,
    below,
    clip_config,
    clip_prefix,
    loose_clip,
    prefix_of,
    t5_config,
    t5_prefix,
)

PREFIX = "model.diffusion_model."  # or none, where a file is the transformer alone
MARK = "joint_blocks.0.x_block.attn.qkv.weight"
HEAD = 64  # channels of a head of every SD3
SCALING, SHIFT = 1.5305, 0.0609  # of latents
MEDIUM, MEDIUM_35, LARGE_35 = (
    f"stabilityai/stable-diffusion-{name}" for name in ("3-medium-diffusers", "3.5-medium", "3.5-large")
)
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
IMAGE = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn.to_out.0", "attn2.proj": "attn2.to_out.0"} | {
    f"{attn}.ln_{part}": f"{attn}.norm_{part}" for attn in ("attn", "attn2") for part in "qk"
}
TEXT = {"adaLN_modulation.1": "norm1_context.linear", "attn.proj": "attn.to_add_out"} | {
    f"attn.ln_{part}": f"attn.norm_added_{part}" for part in "qk"
}
JOINED = {
    ("x_block", "attn"): "attn.to_{}",
    ("x_block", "attn2"): "attn2.to_{}",
    ("context_block", "attn"): "attn.add_{}_proj",
}
STREAMS = {"x_block": (IMAGE, "ff"), "context_block": (TEXT, "ff_context")}


def _fits(names: Collection[str]) -> bool:
    return MARK in names or PREFIX + MARK in names


def _turned(value: mx.array) -> mx.array:
    """Shift, scale to scale, shift."""
    half = value.shape[0] // 2
    return mx.concatenate([value[half:], value[:half]])


def transformer_tensors(arrays: Tensors) -> Tensors:
    """The tensors of SD3Transformer2DModel, lazily. Raises KeyError on one that is missing."""
    own = below(arrays, PREFIX) if PREFIX + MARK in arrays else arrays
    found: Tensors = {"pos_embed.pos_embed": own["pos_embed"]}
    for theirs, ours in OUTSIDE.items():
        found |= {f"{ours}.{kind}": own[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        found[f"norm_out.linear.{kind}"] = _turned(own[f"final_layer.adaLN_modulation.1.{kind}"])
    depth = _blocks(own)
    for index in range(depth):
        for stream, (renamed, mlp) in STREAMS.items():
            block, last = f"transformer_blocks.{index}", stream == "context_block" and index == depth - 1
            inside = below(own, f"joint_blocks.{index}.{stream}.")
            whole = ("adaLN_modulation.1",) if last else ("adaLN_modulation.1", "attn.proj", "mlp.fc1", "mlp.fc2")
            for name in (*whole, "attn.qkv"):
                _ = inside[f"{name}.weight"], inside[f"{name}.bias"]
            for name, value in inside.items():
                place, _, kind = name.rpartition(".")
                if place.endswith(".qkv"):
                    to = JOINED[stream, place.removesuffix(".qkv")]
                    parts = zip("qkv", mx.split(value, 3), strict=True)
                    found |= {f"{block}.{to.format(part)}.{kind}": one for part, one in parts}
                elif place.startswith("mlp.fc"):
                    found[f"{block}.{mlp}.net.{'0.proj' if place == 'mlp.fc1' else '2'}.{kind}"] = value
                else:
                    turn = last and place == "adaLN_modulation.1"
                    found[f"{block}.{renamed[place]}.{kind}"] = _turned(value) if turn else value
    return found


def _blocks(own: Tensors) -> int:
    return len({name.split(".")[1] for name in own if name.startswith("joint_blocks.")})


def transformer_config(tensors: Tensors) -> dict[str, Any]:
    """The config.json of SD3Transformer2DModel, from its tensors."""
    hidden, channels, patch, _ = tensors["pos_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")})
    norm = tensors.get("transformer_blocks.0.attn.norm_q.weight")
    head = HEAD if norm is None else norm.shape[0]
    dual = [i for i in range(depth) if f"transformer_blocks.{i}.attn2.to_q.weight" in tensors]
    return {
        "_class_name": "SD3Transformer2DModel",
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": tensors["proj_out.weight"].shape[0] // patch**2,
        "num_layers": depth,
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": tensors["context_embedder.weight"].shape[1],
        "caption_projection_dim": tensors["context_embedder.weight"].shape[0],
        "pooled_projection_dim": tensors["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "pos_embed_max_size": round(tensors["pos_embed.pos_embed"].shape[1] ** 0.5),
        "dual_attention_layers": dual,
        "qk_norm": None if norm is None else "rms_norm",
    }


def clip_tensors(found: Tensors, large: bool) -> Tensors:
    """A CLIP's tensors. CLIP-L's pooled output stays as it is, whatever projection its file may have: SD3 was trained
    so (``return_projected_pooled=False`` in Stability AI's sd3_infer.py and in ComfyUI's sd3_clip.py). Raises KeyError
    on a CLIP-G without one.
    """
    if not found:
        return found
    words = found[CLIP_WORDS]
    return {**found, PROJECTION: found[PROJECTION] if large else mx.eye(words.shape[1], dtype=words.dtype)}


def _loose_autoencoder(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> str | None:
    """What stands before the names of CompVis' autoencoder with the transformer's channels; None for another file."""
    prefix = prefix_of(shapes, "decoder.conv_in.weight")
    fits = prefix is not None and prefix + "decoder.mid.block_1.norm1.weight" in shapes
    return prefix if fits and shapes[f"{prefix}decoder.conv_in.weight"][1] == config["in_channels"] else None


def _repository(config: dict[str, Any]) -> str:
    if config["dual_attention_layers"]:
        return MEDIUM_35
    return MEDIUM if config["qk_norm"] is None else LARGE_35


def _original(names: Collection[str]) -> tuple[str, str]:
    """The repository of the hub, and in it the file, that is like one with tensors of these names."""
    kind = "large" if any(".ln_q." in name for name in names) else ""
    kind = "medium" if any(".attn2." in name for name in names) else kind
    if not kind:
        return "stabilityai/stable-diffusion-3-medium", "sd3_medium.safetensors"
    return f"stabilityai/stable-diffusion-3.5-{kind}", f"sd3.5_{kind}.safetensors"


FOLDERS = ("text_encoders", "clip")  # ComfyUI's folders
LOOSE = {
    "text_encoder": LooseKind(
        "CLIP-L",
        FOLDERS,
        ("clip_l",),
        lambda shapes, config: clip_prefix(shapes, large=False),
        lambda arrays: clip_tensors(loose_clip(arrays), large=False),
    ),
    "text_encoder_2": LooseKind(
        "CLIP-G",
        FOLDERS,
        ("clip_g",),
        lambda shapes, config: clip_prefix(shapes, large=True),
        lambda arrays: clip_tensors(loose_clip(arrays), large=True),
    ),
    "text_encoder_3": LooseKind(
        "T5",
        FOLDERS,
        ("t5xxl_fp16", "t5xxl"),
        lambda shapes, config: t5_prefix(shapes, config["joint_attention_dim"]),
        lambda arrays: {name: value for name, value in arrays.items() if name.startswith(("shared.", "encoder."))},
    ),
    "vae": LooseKind(  # FLUX's has the same tensors in the same shapes
        "the autoencoder",
        ("vae",),
        ("sd3",),
        _loose_autoencoder,
        lambda arrays: autoencoder_tensors({AUTOENCODER + name: value for name, value in arrays.items()}),
        named=True,
    ),
}
PUBLISHED = {  # in Stability AI's repositories, beside the model
    "text_encoder": "text_encoders/clip_l.safetensors",
    "text_encoder_2": "text_encoders/clip_g.safetensors",
    "text_encoder_3": "text_encoders/t5xxl_fp16.safetensors",
}


SD3_FILE = Layout(
    pipeline="StableDiffusion3Pipeline",
    title="Stable Diffusion 3 or 3.5 (joint_blocks)",
    fits=_fits,
    tensors={
        "transformer": transformer_tensors,
        "vae": autoencoder_tensors,
        "text_encoder": lambda arrays: clip_tensors(below(arrays, "text_encoders.clip_l.transformer."), large=False),
        "text_encoder_2": lambda arrays: clip_tensors(below(arrays, "text_encoders.clip_g.transformer."), large=True),
        "text_encoder_3": lambda arrays: below(arrays, "text_encoders.t5xxl.transformer."),
    },
    configs={
        "transformer": transformer_config,
        "vae": lambda tensors: autoencoder_config(tensors, SCALING, SHIFT),
        "text_encoder": lambda tensors: clip_config(tensors, "quick_gelu"),
        "text_encoder_2": lambda tensors: clip_config(tensors, "gelu"),
        "text_encoder_3": t5_config,
    },
    components=(
        *("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3"),
    ),
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    repository=_repository,
    original=_original,
    together=("text_encoder", "text_encoder_2", "text_encoder_3"),
    loose=LOOSE,
    published=PUBLISHED,
    tokenizers={"tokenizer": CLIP, "tokenizer_2": CLIP, "tokenizer_3": T5},
)
