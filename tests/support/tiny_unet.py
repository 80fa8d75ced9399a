"""Small UNets, as the ``unet/config.json`` of a folder has them, and the hosts and folders around them."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxquant.models.unet.adapter import StableDiffusion
from mlxquant.models.unet.components import CLIPComponents
from mlxquant.models.unet.config import UNetConfig
from mlxquant.models.unet.network import UNet
from mlxquant.sampling.conditioning import Conditioning

SD15 = {  # as Stable Diffusion 1.5: convolutions around transformers, as many heads everywhere
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
SD21 = {  # as 2.1: Linears around transformers, more heads where there are more channels
    **SD15,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": [2, 4, 8],
    "use_linear_projection": True,
    "upcast_attention": True,
}
MIXED = {  # blocks without attention in the middle, two transformer blocks a transformer, blocks of other depths
    **SD21,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": [1, 2, 1],
    "transformer_layers_per_block": [2, 1, 1],
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
FEW = {  # layers: one transformer, where pictures are smallest
    **SD15,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}
CONFIGS = {"1.5": SD15, "2.1": SD21, "mixed": MIXED, "few": FEW}


SCHEDULER = {  # as Stable Diffusion 1.5 is published
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def random_unet(said, seed=0):
    """A UNet with random weights, of norms, too."""
    model, key = UNet(UNetConfig.from_dict(said)), mx.random.key(seed)
    drawn = []
    for name, value in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        scale = 0.2 if value.ndim == 1 else (value.size // value.shape[0]) ** -0.5
        one = float("norm" in name.split(".")[-2] and name.endswith("weight"))
        drawn.append((name, one + scale * mx.random.normal(value.shape, key=own)))
    model.load_weights(drawn)
    model.freeze()
    mx.eval(model.parameters())
    return model


def in_torch(model):
    """Parameters in torch's layouts."""
    return {k: v.transpose(0, 3, 1, 2) if v.ndim == 4 else v for k, v in tree_flatten(model.parameters())}


def waves(width):
    """Text without an encoder: every letter of a prompt is a wave."""

    def encode(prompts):
        letters = np.zeros((len(prompts), 9), np.float32)
        for row, prompt in enumerate(prompts):
            letters[row, : len(prompt)] = [ord(letter) for letter in prompt[:9]]
        return Conditioning(text=mx.array(np.cos(letters[..., None] * np.arange(1, width + 1))))

    return encode


class StubSource:
    place = "stub"

    def config(self, component):
        """Of Stable Diffusion's autoencoder."""
        from support import parts

        return parts.VAE


class Stub(CLIPComponents):
    """Pictures without an autoencoder: the first channels of latents, eight pixels each."""

    source = StubSource()
    autoencoder = None

    def __init__(self, place, width):
        super().__init__(place, width)
        self.text, self.autoencoder = waves(width), self

    def decode(self, latent):
        return mx.repeat(mx.repeat(mx.tanh(latent[..., :3]), 8, 1), 8, 2)


def small_adapter(said=SD15, scheduler=SCHEDULER, seed=0, size=64):
    """A host with random weights and stubs around it."""
    config = UNetConfig.from_dict(said)
    adapter = StableDiffusion(config, scheduler, Stub("", config.cross_attention_dim), size)
    adapter.module.update(random_unet(said, seed).parameters())
    adapter.module.freeze()
    return adapter


def write_folder(folder, said=SD15, scheduler=SCHEDULER, seed=0, dtype=mx.float32):
    """A whole model in the layout of the hub; returns its UNet."""
    from support import parts

    model = random_unet(said, seed)
    parts.write_clip(folder, "text_encoder", dtype=dtype)
    parts.write_clip_tokenizer(folder)
    parts.write_vae(folder, dtype=dtype)
    parts.write_component(folder, "unet", said, in_torch(model), "diffusion_pytorch_model", dtype)
    parts.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    parts.name_component(folder, "scheduler", scheduler["_class_name"])
    return model
