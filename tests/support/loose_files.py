"""Text encoders and an autoencoder in files of their own, as Stability AI publishes them for ComfyUI: names and depths
are the real ones, widths are small.
"""

import json

import mlx.core as mx
import numpy as np

from mlxquant.layers.tree import parameters
from mlxquant.models.sd3.names import to_diffusers

from support import parts
from support.original_files import original_autoencoder, original_transformer
from support.sd3_transformers import DUAL, random_transformer

WIDTH = 64  # a head of CLIP
READS = {"joint_attention_dim": 2 * WIDTH, "pooled_projection_dim": 2 * WIDTH}
SAID = {**DUAL, **READS}
SIZES = {"hidden_size": WIDTH, "num_attention_heads": 1, "intermediate_size": 96, "projection_dim": WIDTH}
CLIP_L = {**parts.CLIP_L_PROJECTED, **SIZES, "num_hidden_layers": 12, "eos_token_id": parts.SIZE - 1}
CLIP_G = {**parts.CLIP_G, **SIZES, "num_hidden_layers": 32}
T5 = {**parts.T5, "d_model": 2 * WIDTH}
PROJECTION = "text_projection.weight"


def clip_l(seed=1):
    """Without a projection, as ``clip_l.safetensors`` is."""
    return {name: value for name, value in parts.clip_tensors(CLIP_L, seed).items() if name != PROJECTION}


def clip_g(seed=2):
    return parts.clip_tensors(CLIP_G, seed)


def t5(seed=3, config=T5):
    return parts.t5_tensors(config, seed)


def write(path, tensors, prefix="", dtype=mx.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {prefix + name: mx.array(value).astype(dtype) for name, value in tensors.items()}
    mx.save_safetensors(str(path), arrays, metadata={"format": "pt"})
    return path


def write_coded(path, tensors, dtype="F8_E4M3"):
    """A file of 8-bit floats, but for the norms, as fp8 files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, data = {}, bytearray()
    for name, value in tensors.items():
        kind = dtype if value.ndim > 1 else "F16"
        start, size = len(data), value.size * (1 if value.ndim > 1 else 2)
        data += bytes(size)
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [start, start + size]}
    text = json.dumps(header).encode()
    path.write_bytes(np.uint64(len(text)).tobytes() + text + bytes(data))
    return path


def write_model(path, said=SAID):
    """A model without text encoders, as ``sd3.5_medium.safetensors``; returns its path."""
    model = random_transformer(said)
    tensors = original_transformer(to_diffusers(parameters(model), model.config))
    return write(path, tensors | original_autoencoder(said["in_channels"], (32, 32, 32, 32)))


def write_comfyui(root, said=SAID):
    """ComfyUI's folders with a model and its text encoders; returns the model's path."""
    write(root / "models" / "text_encoders" / "clip_l.safetensors", clip_l())
    write(root / "models" / "text_encoders" / "clip_g.safetensors", clip_g())
    write(root / "models" / "text_encoders" / "t5xxl_fp16.safetensors", t5())
    return write_model(root / "models" / "checkpoints" / "sd3.5_medium.safetensors", said)
