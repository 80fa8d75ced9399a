"""Random models in the layout of diffusers, at the sizes of the published ones or tiny: what ``real_size.py`` runs.

Configs are those of the hub's folders; names and shapes of tensors are what our networks have, under diffusers' names
and in torch's layouts. The values are those of ``random_tensors``: noise that behaves like a trained model, float16.
Text encoders are not written: a stub stands for them, in the shapes of their outputs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np

from mlxquant.layers.tree import parameters
from mlxquant.models.mmdit.network import MMDiT
from mlxquant.models.parts.autoencoder import AutoencoderKL
from mlxquant.models.pixart.config import PixArtConfig
from mlxquant.models.pixart.network import PixArt
from mlxquant.models.sd3.names import config_from_diffusers, to_diffusers
from mlxquant.models.unet.config import UNetConfig
from mlxquant.models.unet.network import UNet
from mlxquant.sampling.conditioning import Conditioning
from random_tensors import Tensor, write_tensors
from random_text_encoders import write_json

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
MODULATION = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "adaln_single.linear", "time_emb_proj")


@dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        pipeline: The class of diffusers that runs it.
        drawing: The component that draws, and its class in diffusers.
        config: Its config.json.
        tiny: What differs from that in a tiny one.
        shapes: Config to the shapes of its tensors.
        scheduler: Its scheduler_config.json.
        vae: What differs from ``VAE``.
        text: Arrays of the conditioning, and the shape of a prompt's row of each, by config.
    """

    pipeline: str
    drawing: tuple[str, str]
    config: Config
    tiny: Config
    shapes: Callable[[Config], Shapes]
    scheduler: Config
    vae: Config
    text: Callable[[Config], Shapes]


def torch_shapes(arrays: Mapping[str, mx.array]) -> Shapes:
    """Of MLX's parameters; nothing is evaluated."""
    return {
        name: (value.shape[0], value.shape[3], *value.shape[1:3]) if value.ndim == 4 else tuple(value.shape)
        for name, value in arrays.items()
    }


def pixart(config: Config) -> Shapes:
    return torch_shapes(parameters(PixArt(PixArtConfig.from_config(config))))


def unet(config: Config) -> Shapes:
    return torch_shapes(parameters(UNet(UNetConfig.from_dict(config))))


def sd3(config: Config) -> Shapes:
    ours = config_from_diffusers(config, "benchmark")
    return {name: tuple(value.shape) for name, value in to_diffusers(parameters(MMDiT(ours)), ours).items()}


LINEAR_BETAS = {
    "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "beta_start": 0.0001,
    "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "solver_order": 2, "timestep_spacing": "linspace",
}  # fmt: skip
SCALED_BETAS = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "in_channels": 3,
    "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 0.18215,
}  # fmt: skip
VAE_16 = {
    "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}  # fmt: skip
TINY_VAE = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}

PIXART = {
    "_class_name": "PixArtTransformer2DModel", "activation_fn": "gelu-approximate", "attention_bias": True,
    "attention_head_dim": 72, "caption_channels": 4096, "cross_attention_dim": 1152, "in_channels": 4,
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "norm_type": "ada_norm_single", "num_attention_heads": 16,
    "num_layers": 28, "out_channels": 8, "patch_size": 2, "sample_size": 64,
}  # fmt: skip
UNET = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "in_channels": 4, "out_channels": 4,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"], "layers_per_block": 2,
    "norm_num_groups": 32, "sample_size": 64, "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}  # fmt: skip
SD3 = {
    "_class_name": "SD3Transformer2DModel", "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16,
    "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "sample_size": 128,
}  # fmt: skip
SD35 = {**SD3, "dual_attention_layers": [*range(13)], "pos_embed_max_size": 384, "qk_norm": "rms_norm"}
TINY_PIXART = {
    "attention_head_dim": 12, "num_attention_heads": 4, "cross_attention_dim": 48, "num_layers": 2,
    "caption_channels": 32, "sample_size": 8,
}  # fmt: skip
TINY_UNET = {
    "block_out_channels": [16, 32], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1, "cross_attention_dim": 24,
    "attention_head_dim": 2, "norm_num_groups": 8, "sample_size": 8,
}  # fmt: skip
TINY_SD3 = {
    "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32, "num_layers": 2,
    "joint_attention_dim": 64, "pooled_projection_dim": 32, "pos_embed_max_size": 16, "sample_size": 8,
}  # fmt: skip


def _pixart_text(length: int) -> Callable[[Config], Shapes]:
    return lambda config: {"tokens": (length, config["caption_channels"]), "mask": (length,)}


def _sd3_text(config: Config) -> Shapes:
    return {"tokens": (77 + 256, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}


def _sd3(config: Config, tiny: Config) -> Model:
    drawing = "transformer", "SD3Transformer2DModel"
    return Model("StableDiffusion3Pipeline", drawing, config, tiny, sd3, FLOW, VAE_16, _sd3_text)


_transformer = "transformer", "PixArtTransformer2DModel"
MODELS = {
    "pixart-alpha": Model(
        "PixArtAlphaPipeline", _transformer, PIXART, TINY_PIXART, pixart, LINEAR_BETAS, {}, _pixart_text(120)
    ),
    "sd15": Model(
        "StableDiffusionPipeline", ("unet", "UNet2DConditionModel"), UNET, TINY_UNET, unet, SCALED_BETAS, {},
        lambda config: {"text": (77, config["cross_attention_dim"])},
    ),
    "sd3-medium": _sd3(SD3, TINY_SD3),
    "sd3.5-medium": _sd3(SD35, {**TINY_SD3, "dual_attention_layers": [0]}),
}  # fmt: skip


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """What a tensor of a network is drawn from, by its name and shape: outputs stay of about unit scale."""
    path, _, kind = name.rpartition(".")
    if len(shape) == 1:
        if kind == "weight":  # of a norm
            return Tensor(name, shape, 0.1, mean=1.0)
        return Tensor(name, shape, 0.1, outlier=8.0)
    if kind in ("scale_shift_table", "pos_embed"):
        return Tensor(name, shape, 0.3)
    gain = 0.3 if path.endswith(MODULATION) else 1.0
    return Tensor(name, shape, gain / sqrt(prod(shape[1:])), outlier=4.0 if len(shape) == 2 else 1.0)


def tensors(shapes: Shapes) -> Iterator[Tensor]:
    return (tensor(name, shape) for name, shape in shapes.items())


def write_model(folder: Path, name: str, tiny: bool, seed: int = 0) -> int:
    """A folder as the hub has it, without text encoders; returns how many parameters the drawing component has."""
    model = MODELS[name]
    component, kind = model.drawing
    config = {**model.config, **(model.tiny if tiny else {})}
    vae = {**VAE, **model.vae, **(TINY_VAE if tiny else {})}
    shapes = model.shapes(config)
    for place, said, found in ((component, config, shapes), ("vae", vae, torch_shapes(parameters(AutoencoderKL(vae))))):
        write_json(folder / place / "config.json", said)
        write_tensors(folder / place / "diffusion_pytorch_model.safetensors", tensors(found), seed)
    write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler)
    index = {component: kind, "vae": "AutoencoderKL", "scheduler": model.scheduler["_class_name"]}
    named = {place: ["diffusers", held] for place, held in index.items()}
    write_json(folder / "model_index.json", {"_class_name": model.pipeline, **named})
    return sum(map(prod, shapes.values()))


def stub_text(name: str, config: Config) -> Callable[[list[str]], Conditioning]:
    """A text encoder without weights: noise for each prompt, of about the scale of the real one's; masks end where the
    prompt does.
    """
    shapes = MODELS[name].text(config)

    def rows(prompts: Sequence[str], key: str, shape: tuple[int, ...]) -> mx.array:
        if key == "mask":
            ends = np.array([min(shape[0], 1 + len(prompt.split())) for prompt in prompts])
            return mx.array(np.arange(shape[0]) < ends[:, None])
        drawn = [np.random.default_rng(zlib.crc32(prompt.encode())).standard_normal(shape) for prompt in prompts]
        return mx.array(np.stack(drawn).astype(np.float32) * np.float32(0.2 if key == "tokens" else 1.0))

    return lambda prompts: Conditioning(**{key: rows(prompts, key, shape) for key, shape in shapes.items()})
