"""Single files of Stable Diffusion 3 and 3.5: ``sd3_medium*.safetensors``, ``sd3.5_*.safetensors``, with or without
text encoders.

Their transformer joins queries, keys and values in one Linear, and writes shift before scale everywhere, which
diffusers turns in two places.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import mlx.core as mx

from .compvis_autoencoder import autoencoder_config, autoencoder_tensors
from .single_file import Layout
from .source import Tensors
from .text_encoders import below, clip_config, t5_config

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


def clip_tensors(arrays: Tensors, which: str) -> Tensors:
    """A CLIP's tensors. CLIP-L's projection is not in these files, for it is none: its pooled output stays as it is."""
    found = below(arrays, f"text_encoders.clip_{which}.transformer.")
    if found and which == "l" and "text_projection.weight" not in found:
        words = found["text_model.embeddings.token_embedding.weight"]
        found["text_projection.weight"] = mx.eye(words.shape[1], dtype=words.dtype)
    return found


def _repository(config: dict[str, Any]) -> str:
    if config["dual_attention_layers"]:
        return MEDIUM_35
    return MEDIUM if config["qk_norm"] is None else LARGE_35


def _original(names: Collection[str]) -> str:
    """The command that downloads a file like one with tensors of these names."""
    kind = "large" if any(".ln_q." in name for name in names) else ""
    kind = "medium" if any(".attn2." in name for name in names) else kind
    if not kind:
        return "hf download stabilityai/stable-diffusion-3-medium sd3_medium.safetensors"
    return f"hf download stabilityai/stable-diffusion-3.5-{kind} sd3.5_{kind}.safetensors"


SD3_FILE = Layout(
    pipeline="StableDiffusion3Pipeline",
    title="Stable Diffusion 3 or 3.5 (joint_blocks)",
    fits=_fits,
    tensors={
        "transformer": transformer_tensors,
        "vae": autoencoder_tensors,
        "text_encoder": lambda arrays: clip_tensors(arrays, "l"),
        "text_encoder_2": lambda arrays: clip_tensors(arrays, "g"),
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
)
