"""The transformer of SD3 as diffusers has it: its config and its names, to ours and back.

diffusers writes scale and shift of its last norms the other way round: of ``norm_out``, and of the last block's
``norm1_context``, which only feeds keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx

from ...errors import ArtifactError
from ...files import schema
from ...files.schema import MismatchError
from ..mmdit.config import MMDiTConfig

Tensors = dict[str, mx.array]

FREQUENCIES = 256  # of the timestep, in every SD3 of diffusers
RMS = "rms_norm"
WIDTH, SIDE = schema.whole(1, schema.WIDTH), schema.whole(1, 4096)
SAID = {  # what a config.json says, with the defaults of diffusers
    "patch_size": (schema.whole(1, 64), 2),
    "in_channels": (SIDE, 16),
    "out_channels": (schema.maybe(SIDE), 16),
    "num_layers": (schema.whole(1, schema.DEPTH), 18),
    "attention_head_dim": (WIDTH, 64),
    "num_attention_heads": (WIDTH, 18),
    "joint_attention_dim": (WIDTH, 4096),
    "caption_projection_dim": (WIDTH, 1152),
    "pooled_projection_dim": (WIDTH, 2048),
    "pos_embed_max_size": (SIDE, 96),
    "dual_attention_layers": (schema.maybe(schema.array_of(schema.whole(0, schema.DEPTH))), []),
    "qk_norm": (schema.maybe(schema.one_of(RMS)), None),
}


def config_from_diffusers(said: Mapping[str, Any], where: str) -> MMDiTConfig:
    """The sizes in a ``config.json`` of SD3Transformer2DModel.

    Args:
        said: What it says.
        where: Whose it is, for errors.

    Raises:
        ArtifactError: It is another model's, or damaged.
    """
    try:
        for name, (check, default) in SAID.items():
            check(said.get(name, default), name)
    except MismatchError as error:
        raise ArtifactError(
            f"{where}: the transformer's config.json: {error}; expected the one of SD3Transformer2DModel"
        ) from error
    get = {name: said.get(name, default) for name, (_, default) in SAID.items()}
    hidden = get["num_attention_heads"] * get["attention_head_dim"]
    if get["caption_projection_dim"] != hidden or get["out_channels"] not in (None, get["in_channels"]):
        raise ArtifactError(
            f"{where}: the transformer's config.json has caption_projection_dim {get['caption_projection_dim']} and"
            f" out_channels {get['out_channels']}, expected {hidden} and {get['in_channels']} as in every SD3"
        )
    return MMDiTConfig(
        num_heads=get["num_attention_heads"],
        depth_multimodal=get["num_layers"],
        hidden_size=hidden,
        vae_latent_dim=get["in_channels"],
        patch_size=get["patch_size"],
        max_latent_resolution=get["pos_embed_max_size"],
        pooled_text_embed_dim=get["pooled_projection_dim"],
        token_level_text_embed_dim=get["joint_attention_dim"],
        frequency_embed_dim=FREQUENCIES,
        use_qk_norm=get["qk_norm"] is not None,
        dual_attention_layers=tuple(i for i in get["dual_attention_layers"] or () if i < get["num_layers"]),
        key_bias=True,
        gelu="tanh",
    )


def config_to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    """The ``config.json`` that gives these sizes."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "patch_size": config.patch_size,
        "in_channels": config.vae_latent_dim,
        "out_channels": config.vae_latent_dim,
        "num_layers": config.depth_multimodal,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.token_level_text_embed_dim,
        "caption_projection_dim": config.hidden_size,
        "pooled_projection_dim": config.pooled_text_embed_dim,
        "pos_embed_max_size": config.max_latent_resolution,
        "dual_attention_layers": list(config.dual_attention_layers),
        "qk_norm": RMS if config.use_qk_norm else None,
    }


def module_names(config: MMDiTConfig) -> dict[str, str]:
    """By path of a module of ours that has parameters its path in diffusers."""
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.layers.1": "norm_out.linear",
    }
    for ours, theirs in (("t", "timestep"), ("y", "text")):
        for place, number in ((0, 1), (2, 2)):
            names[f"{ours}_embedder.mlp.layers.{place}"] = f"time_text_embed.{theirs}_embedder.linear_{number}"
    for index in range(config.depth_multimodal):
        names |= dict(_block(config, index))
    return names


def _block(config: MMDiTConfig, index: int) -> Iterator[tuple[str, str]]:
    last = index == config.depth_multimodal - 1
    image, text = (f"multimodal_transformer_blocks.{index}.{name}_transformer_block" for name in ("image", "text"))
    block = f"transformer_blocks.{index}"
    yield f"{image}.adaLN_modulation.layers.1", f"{block}.norm1.linear"
    yield f"{text}.adaLN_modulation.layers.1", f"{block}.norm1_context.linear"
    for part in "qkv":
        yield f"{image}.attn.{part}_proj", f"{block}.attn.to_{part}"
        yield f"{text}.attn.{part}_proj", f"{block}.attn.add_{part}_proj"
    yield f"{image}.attn.o_proj", f"{block}.attn.to_out.0"
    dual = index in config.dual_attention_layers
    if dual:
        for part in "qkv":
            yield f"{image}.attn2.{part}_proj", f"{block}.attn2.to_{part}"
        yield f"{image}.attn2.o_proj", f"{block}.attn2.to_out.0"
    if config.use_qk_norm:
        for part in "qk":
            yield f"{image}.qk_norm.{part}_norm", f"{block}.attn.norm_{part}"
            yield f"{text}.qk_norm.{part}_norm", f"{block}.attn.norm_added_{part}"
            if dual:
                yield f"{image}.qk_norm2.{part}_norm", f"{block}.attn2.norm_{part}"
    if not last:
        yield f"{text}.attn.o_proj", f"{block}.attn.to_add_out"
    for stream, name in ((image, "ff"),) if last else ((image, "ff"), (text, "ff_context")):
        yield f"{stream}.mlp.fc1", f"{block}.{name}.net.0.proj"
        yield f"{stream}.mlp.fc2", f"{block}.{name}.net.2"


def turned_modules(config: MMDiTConfig) -> tuple[str, str]:
    """The modules of diffusers that write scale and shift where ours write shift and scale."""
    return "norm_out.linear", f"transformer_blocks.{config.depth_multimodal - 1}.norm1_context.linear"


def swapped_halves(value: mx.array) -> mx.array:
    """The rows of the second half before those of the first."""
    half = value.shape[0] // 2
    return mx.concatenate([value[half:], value[:half]])


POSITIONS = ("x_pos_embedder.pos_embed.weight", "pos_embed.pos_embed")  # ours [N,D], theirs [1,N,D]


def from_diffusers(tensors: Mapping[str, mx.array], config: MMDiTConfig) -> Tensors:
    """Our transformer's parameters, lazily. What is missing there is missing here; what is of no use is left out.

    Args:
        tensors: Those of SD3Transformer2DModel.
        config: The sizes of the model.
    """
    found, turned = Tensors(), turned_modules(config)
    for ours, theirs in module_names(config).items():
        for kind in ("weight", "bias"):
            if (value := tensors.get(f"{theirs}.{kind}")) is None:
                continue
            value = swapped_halves(value) if theirs in turned else value
            found[f"{ours}.{kind}"] = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
    if (table := tensors.get(POSITIONS[1])) is not None:
        found[POSITIONS[0]] = table.reshape(-1, table.shape[-1])
    return found


def to_diffusers(parameters: Mapping[str, mx.array], config: MMDiTConfig) -> Tensors:
    """The inverse of ``from_diffusers``; a bias of keys that a model does not have is zeros.

    Args:
        parameters: Those of our transformer.
        config: The sizes of the model.
    """
    found, turned = Tensors(), turned_modules(config)
    for ours, theirs in module_names(config).items():
        for kind in ("weight", "bias"):
            value = parameters.get(f"{ours}.{kind}")
            if value is None and kind == "bias" and ours.endswith(".k_proj"):
                value = mx.zeros_like(parameters[f"{ours}.weight"][:, 0])
            if value is None:
                continue
            value = swapped_halves(value) if theirs in turned else value
            found[f"{theirs}.{kind}"] = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
    found[POSITIONS[1]] = parameters[POSITIONS[0]][None]
    return found
