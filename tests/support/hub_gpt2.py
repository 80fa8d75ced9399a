"""A tiny GPT-2 as OpenAI's stands on the hub: weights as [in,out] without a prefix, attention masks among them, and
the tokenizer's files in both of their formats.
"""

import hashlib
import json

import numpy as np
from safetensors.numpy import save_file

from mlxquant.models.gpt.tokenizers import byte_letters

MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
CONFIG = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 259,
    "embd_pdrop": 0.1, "eos_token_id": 259, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 24, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 24, "resid_pdrop": 0.1,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 260,
}  # fmt: skip


def gpt2_weights(config=CONFIG, seed=0):
    rng, width = np.random.default_rng(seed), config["n_embd"]

    def random(*shape, scale=0.2, around=0.0):
        return (around + scale * rng.standard_normal(shape)).astype(np.float32)

    arrays = {"wte.weight": random(config["vocab_size"], width), "wpe.weight": random(config["n_positions"], width)}
    mask = np.tril(np.ones((config["n_ctx"],) * 2, np.float32))[None, None]
    for block in range(config["n_layer"]):
        shapes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width), "mlp.c_fc": (width, 4 * width),
                  "mlp.c_proj": (4 * width, width)}  # fmt: skip
        for name, shape in shapes.items():
            arrays |= {f"h.{block}.{name}.weight": random(*shape), f"h.{block}.{name}.bias": random(shape[1])}
        for name in ("ln_1", "ln_2"):
            arrays |= {f"h.{block}.{name}.weight": random(width, around=1.0), f"h.{block}.{name}.bias": random(width)}
        arrays[f"h.{block}.attn.bias"] = mask
    return arrays | {"ln_f.weight": random(width, around=1.0), "ln_f.bias": random(width)}


def gpt2_checkpoint(folder, **changes):
    """The files of the repository, in a folder."""
    config = CONFIG | changes
    folder.mkdir(parents=True, exist_ok=True)
    save_file(gpt2_weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    letters = [*byte_letters(), *("".join(pair) for pair in MERGES), "<|endoftext|>"]
    vocabulary = {letter: token for token, letter in enumerate(letters)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": 259, "special": True, "content": "<|endoftext|>", "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": True}  # fmt: skip
    model = {"dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
             "fuse_unk": False, "vocab": vocabulary, "merges": list(map(" ".join, MERGES))}  # fmt: skip
    described = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
                 "pre_tokenizer": split, "post_processor": {**split, "trim_offsets": False}, "decoder": split,
                 "model": model}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


def hub_cache(place, repository="gpt2", **changes):
    """A cache of huggingface_hub's with the repository in it, as a download leaves it."""
    home = place / f"models--{repository.replace('/', '--')}"
    revision = hashlib.sha1(repository.encode()).hexdigest()
    gpt2_checkpoint(home / "snapshots" / revision, **changes)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    return place
