"""A tiny Stable Diffusion 3 in the layout of diffusers, of random numbers, written without diffusers."""

import json

import mlx.core as mx

from mlxquant.layers.tree import parameters
from mlxquant.models.parts.autoencoder import AutoencoderKL
from mlxquant.models.sd3.names import config_to_diffusers, to_diffusers
from mlxquant.sampling.conditioning import Conditioning

from support import parts
from support.sd3_transformers import random_transformer

INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 8, 16],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}


def write_json(path, said):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said))


def torch_layout(module):
    """A module's parameters as torch has them: kernels have channels before places."""
    return {k: v.transpose(0, 3, 1, 2) if v.ndim == 4 else v for k, v in parameters(module).items()}


def write_weights(folder, tensors, dtype=mx.float32, name="diffusion_pytorch_model"):
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / f"{name}.safetensors"), {k: v.astype(dtype) for k, v in tensors.items()})


def write_drawing(folder, said, dtype=mx.float32, scheduler=SCHEDULER, vae=VAE):
    """Transformer of a configuration, autoencoder and scheduler: all but the text. Returns the transformer."""
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    model = random_transformer(said)
    write_json(folder / "transformer" / "config.json", config_to_diffusers(model.config))
    write_weights(folder / "transformer", to_diffusers(parameters(model), model.config), dtype)
    write_json(folder / "vae" / "config.json", vae)
    mx.random.seed(3)
    write_weights(folder / "vae", torch_layout(AutoencoderKL(vae)))
    return model


def stub_text(prompts, width=24, pooled=20, tokens=6):
    """A text encoder without weights: noise for each prompt, in the shapes of ``sd3_transformers.SIZES``."""
    keys = [mx.random.key(sum(prompt.encode())) for prompt in prompts]
    return Conditioning(
        tokens=mx.stack([mx.random.normal((tokens, width), key=key) for key in keys]),
        pooled=mx.stack([mx.random.normal((pooled,), key=mx.random.split(key)[0]) for key in keys]),
    )


TEXT = {"joint_attention_dim": 80, "pooled_projection_dim": 56}  # what the encoders of ``write_text`` write


def write_text(folder, t5=True):
    """Text encoders and tokenizers, small but whole; the vocabulary of T5 is trained by sentencepiece."""
    parts.write_clip(folder, "text_encoder", parts.CLIP_L_PROJECTED, seed=1)
    parts.write_clip(folder, "text_encoder_2", parts.CLIP_G, seed=2)
    parts.write_clip_tokenizer(folder, "tokenizer")
    parts.write_clip_tokenizer(folder, "tokenizer_2", pad="!")
    if t5:
        parts.write_t5(folder, "text_encoder_3", {**parts.T5, "d_model": TEXT["joint_attention_dim"]}, seed=3)
        parts.write_t5_tokenizer(folder, "tokenizer_3")
        return
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {name: [None, None] for name in ("text_encoder_3", "tokenizer_3")})


def write_whole(folder, said, t5=True, text=TEXT):
    """A whole model: a transformer of a configuration for text encoders that write ``text``, and all that stands around
    it.
    """
    write_drawing(folder, {**said, **text})
    write_text(folder, t5)
    return folder
