"""Small language models for tests: a GPT of ours and, where mlx-lm is installed, a Llama, both with the byte tokenizer,
as folders.
"""

import json

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxquant.models.gpt.files import save_gpt
from mlxquant.models.gpt.network import GPTConfig
from mlxquant.models.gpt.tokenizers import ByteTokenizer
from mlxquant.qat.training import fresh_gpt

TEXT = "def add(first, second):\n    return first + second\n" * 200
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def tiny_gpt(seed=0, width=64, layers=2):
    """Not trained, but with matrices large enough for every layer to matter."""
    model = fresh_gpt(GPTConfig(256, 32, width, 4, layers), seed)
    grown = [
        (name, 4 * value)
        for name, value in tree_flatten(model.parameters())
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
    ]
    model.load_weights(grown, strict=False)
    mx.eval(model.parameters())
    return model


def gpt_folder(folder, seed=0):
    save_gpt(folder, tiny_gpt(seed), ByteTokenizer(), {})
    return folder


def llama_folder(folder, seed=0, dtype=mx.float32, **changes):
    """As mlx-lm writes it; needs mlx-lm."""
    from mlx_lm.models import llama

    config = {**LLAMA, **changes}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    rng = np.random.default_rng(seed)
    arrays = {
        name: mx.array(rng.normal(0, value.shape[-1] ** -0.5, value.shape).astype(np.float32)).astype(dtype)
        if value.ndim > 1
        else value.astype(dtype)
        for name, value in tree_flatten(model.parameters())
    }
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in ByteTokenizer().files().items():
        (folder / name).write_text(text)
    return folder
