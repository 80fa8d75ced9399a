"""Tiny PixArts with random weights, and the folders that diffusers would read them from."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import json

import mlx.core as mx
import numpy as np

from mlxquant.layers.tree import parameters
from mlxquant.models.pixart.adapter import PixArtAlpha
from mlxquant.models.pixart.components import PixArtComponents
from mlxquant.models.pixart.config import PixArtConfig
from mlxquant.models.pixart.network import PixArt
from mlxquant.sampling.conditioning import Conditioning

from support import parts

GAIN = 0.8  # of weights: attentions choose between tokens, and float32 still tells five digits
SMALL = {  # as transformer/config.json has it
    "_class_name": "PixArtTransformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 12,
    "attention_type": "default",
    "caption_channels": 20,
    "cross_attention_dim": 24,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 2,
    "num_embeds_ada_norm": 1000,
    "num_layers": 2,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 8,
    "upcast_attention": False,
}
CONFIGS = {  # by what is special about it: what differs from ``SMALL``
    "512": {},
    "1024": {"sample_size": 128},
    "sigma": {"sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": False},
    "interpolated": {"interpolation_scale": 2},
    "no variance": {"out_channels": 4},
    "no bias": {"attention_bias": False},
    "small heads": {"attention_head_dim": 4, "num_attention_heads": 4, "cross_attention_dim": 16},
    "one block": {"sample_size": 128, "num_layers": 1},
    "one block, 512": {"num_layers": 1},
    "four blocks": {"num_layers": 4},
    "large patches": {"patch_size": 4, "num_layers": 1},
}


def small_config(name="512"):
    """What transformer/config.json says."""
    return SMALL | CONFIGS[name]


def small_network(config, seed=0):
    """With weights that are not as regular as fresh ones: every bias and table counts."""
    network = PixArt(PixArtConfig.from_config(config))
    keys = iter(mx.random.split(mx.random.key(seed), 500))
    network.apply(
        lambda x: mx.random.normal(x.shape, key=next(keys)) * (GAIN * x[0].size ** -0.5 if x.ndim > 1 else 0.1)
    )
    network.freeze()
    mx.eval(network.parameters())
    return network


SCHEDULER = {  # as scheduler/scheduler_config.json of the hub's folders
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.22.0.dev0",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "lambda_min_clipped": float("-inf"),
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_karras_sigmas": False,
    "variance_type": None,
}
LENGTH = 9  # of prompts, for stubs


class StubComponents(PixArtComponents):
    """Text without an encoder: a word is a wave, padding is loud. A picture is made of the first channels of latents,
    eight pixels each.
    """

    def __init__(self, place, length):
        super().__init__(place, length)
        self.text = self.waves

    def waves(self, prompts):
        tokens = np.full((len(prompts), LENGTH, SMALL["caption_channels"]), 50.0, np.float32)
        lengths = []
        for row, prompt in enumerate(prompts):
            words = [*prompt.split()[: LENGTH - 1], ""]
            waves = [np.cos(np.arange(SMALL["caption_channels"]) + sum(map(ord, word))) for word in words]
            tokens[row, : len(words)] = waves
            lengths.append(len(words))
        mask = np.arange(LENGTH) < np.array(lengths)[:, None]
        return Conditioning(tokens=mx.array(tokens), mask=mx.array(mask))

    @property
    def source(self):
        return StubSource()

    @property
    def autoencoder(self):
        return StubSource()


class StubSource:
    place = "stub"

    def config(self, component):
        return parts.VAE

    def decode(self, latent):
        return mx.repeat(mx.repeat(mx.tanh(latent[..., :3]), 8, 1), 8, 2)


def small_adapter(name="512", kind=PixArtAlpha, seed=0):
    """A host with random weights and stubs around it. Its pictures are small also where its model is for large ones."""
    config = PixArtConfig.from_config(small_config(name))
    scheduler = {**SCHEDULER, "lambda_min_clipped": "-inf"}
    adapter = kind(config, scheduler, 8, StubComponents("", LENGTH), mx.float32)
    adapter.module.update(small_network(small_config(name), seed).parameters())
    adapter.module.freeze()
    adapter.resize((64, 96))
    return adapter


def write_drawing(folder, name="512", kind=PixArtAlpha, dtype=mx.float32, seed=0):
    """A folder as the hub has it, tiny and with random weights, without text encoder and tokenizer."""
    config = small_config(name)
    network = small_network(config, seed)
    arrays = {
        path: value.transpose(0, 3, 1, 2) if value.ndim == 4 else value for path, value in parameters(network).items()
    }
    parts.write_component(folder, "transformer", config, arrays, stem="diffusion_pytorch_model", dtype=dtype)
    parts.write_vae(folder)
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    parts.name_component(folder, "scheduler", SCHEDULER["_class_name"])
    index = json.loads((folder / "model_index.json").read_text())
    parts.write_json(folder / "model_index.json", index | {"_class_name": kind.pipeline})
    return folder


def write_pixart(folder, name="512", kind=PixArtAlpha, dtype=mx.float32, seed=0):
    """The same with a T5 and its tokenizer, which the package sentencepiece makes."""
    write_drawing(folder, name, kind, dtype, seed)
    parts.write_t5(folder, "text_encoder", {**parts.T5, "d_model": SMALL["caption_channels"]})
    parts.write_t5_tokenizer(folder)
    return folder
