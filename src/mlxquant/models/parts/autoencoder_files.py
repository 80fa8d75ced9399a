"""Autoencoders from what people have on disk: their config, checked, and their tensors under today's names."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...errors import ArtifactError
from ...files import schema
from ..checkpoints.source import Source, Tensors
from .autoencoder import AutoencoderKL, groups_of
from .loading import fill, in_place, read_config

CLASS = "AutoencoderKL"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of the attention in the middle

SIZE = schema.whole(1, schema.WIDTH)
FACTOR = schema.number(1e-6, 1e6)
CONFIG = schema.entries(
    {
        "block_out_channels": schema.array_of(SIZE, 1, 16),
        "latent_channels": SIZE,
        "down_block_types": schema.array_of(schema.one_of("DownEncoderBlock2D")),
        "up_block_types": schema.array_of(schema.one_of("UpDecoderBlock2D")),
    },
    {
        "in_channels": SIZE,
        "out_channels": SIZE,
        "layers_per_block": schema.whole(1, schema.DEPTH),
        "norm_num_groups": SIZE,
        "act_fn": schema.one_of("silu", "swish"),
        "scaling_factor": FACTOR,
        "shift_factor": schema.maybe(schema.number(-1e6, 1e6)),
        "latents_mean": schema.one_of(None),
        "latents_std": schema.one_of(None),
        "use_quant_conv": schema.flag,
        "use_post_quant_conv": schema.flag,
        "mid_block_add_attention": schema.flag,
    },
)


def load_autoencoder(source: Source, component: str, dtype: mx.Dtype) -> AutoencoderKL:
    """An autoencoder with its weights; those of the encoder are not read from the disk before it encodes.

    Args:
        source: Where the model is.
        component: "vae".
        dtype: Of weights and results; in float16 some decoders overflow.

    Raises:
        ArtifactError: Its config is another class's or has blocks of other kinds, a tensor is missing or of another
            shape.
    """
    config = _read(source, component)
    model = AutoencoderKL(config)
    fill(model, _with_new_names(source.tensors(component)), dtype, in_place(source, component))
    return model


def pixels_of(source: Source, component: str, channels: int) -> int:
    """Pixels of a picture's side for one of a latent, by the config of the autoencoder alone.

    Args:
        source: Where the model is.
        component: "vae".
        channels: Of the latents that the network draws.

    Raises:
        ArtifactError: As ``load_autoencoder``, or its latents are not the network's.
    """
    config = _read(source, component)
    if config["latent_channels"] != channels:
        raise ArtifactError(
            f"{source.place}: its autoencoder has latents of {config['latent_channels']} channels, and the network"
            f" reads {channels}; one of the two is another model's"
        )
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _read(source: Source, component: str) -> dict[str, Any]:
    """The config of an autoencoder."""
    config = read_config(source, component, (CLASS,), CONFIG)
    widths, groups = config["block_out_channels"], groups_of(config)
    if any(len(config[kinds]) != len(widths) for kinds in ("down_block_types", "up_block_types")) or any(
        width % groups for width in widths
    ):
        raise ArtifactError(
            f"{source.place}: {component}/config.json: block_out_channels {widths} do not go with"
            f" {len(config['down_block_types'])} and {len(config['up_block_types'])} blocks and {groups} groups of"
            " channels; download it again"
        )
    return config


def _with_new_names(arrays: Tensors) -> Tensors:
    """With the attention's parameters under today's names and as matrices, whatever release wrote them."""
    found = {}
    for name, value in arrays.items():
        stem, _, kind = name.rpartition(".")
        block, _, old = stem.rpartition(".")
        if ".attentions." in name:
            name = f"{block}.{OLD_NAMES.get(old, old)}.{kind}"
            value = value.reshape(value.shape[:2]) if value.shape[2:] == (1, 1) else value
        found[name] = value
    return found
