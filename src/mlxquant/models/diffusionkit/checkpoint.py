"""What is in ``sd3_medium.safetensors``: the transformer and the VAE, read lazily and under DiffusionKit's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...errors import ArtifactError, reason
from ...files.hub import lazy_tensors
from ..mmdit.config import MMDiTConfig
from .package import host

MMDIT_PREFIX = "model.diffusion_model."
HEAD_DIM = 64  # of every SD3 model
GROUPS = 32  # of the VAE's group norms

Arrays = dict[str, mx.array]


def mmdit_weights(path: Path) -> tuple[MMDiTConfig, Arrays]:
    """Sizes and parameters of the transformer in a checkpoint; ArtifactError when it is another model's."""
    arrays = {name: value for name, value in lazy_tensors(path).items() if name.startswith(MMDIT_PREFIX)}
    needed = [
        MMDIT_PREFIX + name
        for name in ("x_embedder.proj.weight", "pos_embed", "joint_blocks.0.x_block.attn.qkv.weight")
    ]
    if missing := [name for name in needed if name not in arrays]:
        raise ArtifactError(
            f"{path}: holds no SD3 transformer (no {missing[0]}); expected Stability AI's sd3_medium.safetensors"
        )
    if other := next((name for name in arrays if ".attn2." in name or ".ln_q." in name), None):
        raise ArtifactError(f"{path}: {other} is of an SD3.5 transformer; expected SD3-Medium's")
    try:
        weights = host().model_io.mmdit_state_dict_adjustments(arrays, prefix=MMDIT_PREFIX)
        return _config(weights), weights
    except (KeyError, ValueError, IndexError) as error:
        raise ArtifactError(
            f"{path}: the transformer lacks a tensor or has one of another shape ({reason(error)}); download it again"
        ) from error


def _config(weights: Arrays) -> MMDiTConfig:
    """The sizes that the shapes of the parameters say."""
    hidden, patch, _, channels = weights["x_embedder.proj.weight"].shape
    blocks = {name.split(".")[1] for name in weights if name.startswith("multimodal_transformer_blocks.")}
    first = "multimodal_transformer_blocks.0.image_transformer_block"
    return MMDiTConfig(
        num_heads=hidden // HEAD_DIM,
        depth_multimodal=len(blocks),
        hidden_size=hidden,
        mlp_ratio=weights[f"{first}.mlp.fc1.weight"].shape[0] // hidden,
        vae_latent_dim=channels,
        patch_size=patch,
        max_latent_resolution=round(weights["x_pos_embedder.pos_embed.weight"].shape[0] ** 0.5),
        pooled_text_embed_dim=weights["y_embedder.mlp.layers.0.weight"].shape[1],
        token_level_text_embed_dim=weights["context_embedder.weight"].shape[1],
        frequency_embed_dim=weights["t_embedder.mlp.layers.0.weight"].shape[1],
    )


def vae_decoder(path: Path) -> Any:
    """DiffusionKit's VAE decoder, latents to pictures in [-1,1], with a checkpoint's weights, in float32."""

    def build(weights: Arrays) -> Any:
        widths, layers = _levels(weights, "up_blocks")
        return host().vae.VAEDecoder(
            in_channels=weights["conv_in.weight"].shape[-1],
            block_out_channels=widths,
            layers_per_block=layers,
            resnet_groups=GROUPS,
        )

    return _vae(path, "first_stage_model.decoder.", host().model_io.vae_decoder_state_dict_adjustments, build)


def vae_encoder(path: Path) -> Any:
    """DiffusionKit's VAE encoder, pictures in [-1,1] to means and log variances, with a checkpoint's weights, in
    float32.
    """

    def build(weights: Arrays) -> Any:
        widths, layers = _levels(weights, "down_blocks")
        out = weights["conv_out.weight"].shape[0]
        return host().vae.VAEEncoder(
            out_channels=out, block_out_channels=widths, layers_per_block=layers, resnet_groups=GROUPS
        )

    return _vae(path, "first_stage_model.encoder.", host().model_io.vae_encoder_state_dict_adjustments, build)


def _levels(weights: Arrays, blocks: str) -> tuple[list[int], int]:
    """Channels of each resolution level, finest first, and how many residual blocks a level has."""
    depth = len({name.split(".")[1] for name in weights if name.startswith(f"{blocks}.")})
    layers = len({name.split(".")[3] for name in weights if name.startswith(f"{blocks}.0.resnets.")})
    return [weights[f"{blocks}.{i}.resnets.0.conv1.weight"].shape[0] for i in range(depth)], layers


def _vae(path: Path, prefix: str, adjust: Callable[..., Arrays], build: Callable[[Arrays], Any]) -> Any:
    arrays = {name: value for name, value in lazy_tensors(path).items() if name.startswith(prefix)}
    if not arrays:
        raise ArtifactError(f"{path}: holds no tensors {prefix}*; expected Stability AI's sd3_medium.safetensors")
    try:
        weights = adjust(arrays, prefix=prefix)
        module = build(weights)
    except (KeyError, ValueError, IndexError) as error:
        raise ArtifactError(
            f"{path}: a tensor of the VAE is missing or has another shape ({reason(error)}); download it again"
        ) from error
    fill(module, weights, mx.float32, f"{path}: {prefix}*")
    return module


def fill(module: nn.Module, weights: Mapping[str, mx.array], dtype: mx.Dtype, source: str) -> None:
    """Give a module its parameters as ``dtype``, ignoring tensors that it has no place for; ArtifactError where one is
    missing.
    """
    expected = dict(tree_flatten(module.parameters()))
    if missing := sorted(set(expected) - set(weights)):
        raise ArtifactError(
            f"{source}: {len(missing)} tensors are missing, such as {missing[0]}; the file is another model's"
        )
    for name, value in expected.items():
        if weights[name].shape != value.shape:
            raise ArtifactError(
                f"{source}: {name} has shape {weights[name].shape}, expected {value.shape}; the file is another model's"
            )
    module.load_weights([(name, weights[name].astype(dtype)) for name in expected])
