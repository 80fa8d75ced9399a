"""Components of a picture model as the hub has them, tiny and with random weights: text encoders, autoencoders and
tokenizers in folders of the diffusers layout. What torch-free packages write them needs no extra but a spiece.model,
which sentencepiece trains.
"""

import io
import json

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxquant.models.gpt.tokenizers import byte_letters
from mlxquant.models.parts.autoencoder import AutoencoderKL
from mlxquant.models.parts.clip import CLIPText
from mlxquant.models.parts.t5 import SHARED, needed_shapes
from mlxquant.models.parts.tokenizers import BEGIN, END

from support.random_weights import random_tensors

MERGES = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("o", "n</w>"), ("Ã", "©"), ("ð", "Ł")]
LETTERS = sorted(byte_letters(), key=lambda letter: (ord(letter) > 255, ord(letter)))  # "!" is the first, as CLIP's
WORDS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *("".join(pair) for pair in MERGES), BEGIN, END]
TEXTS = [
    "A photo of a cat sitting on a mat, in the style of Monet.",
    "Two dogs run over the green hills; a café by the sea, at 4 o'clock.",
    "An astronaut riding a horse on Mars, highly detailed!",
    "The quick brown fox jumps over the lazy dog 1234567890.",
]  # what the T5s' vocabularies are trained on
EXTRA_IDS, SIZE = 10, len(WORDS)

CLIP_L = {  # as text_encoder/config.json of SD1.5; its end token is that of old configs
    "architectures": ["CLIPTextModel"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 77, "vocab_size": SIZE, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "projection_dim": 32, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1,
    "model_type": "clip_text_model",
}  # fmt: skip
CLIP_L_PROJECTED = {**CLIP_L, "architectures": ["CLIPTextModelWithProjection"]}  # SD3's
CLIP_G = {
    **CLIP_L_PROJECTED, "hidden_size": 40, "num_attention_heads": 5, "projection_dim": 24, "hidden_act": "gelu",
    "eos_token_id": SIZE - 1, "bos_token_id": SIZE - 2,
}  # fmt: skip
T5 = {
    "architectures": ["T5EncoderModel"], "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4,
    "vocab_size": 160, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False,
    "is_encoder_decoder": False, "model_type": "t5",
}  # fmt: skip
VAE = {  # as vae/config.json of SD1.5
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [8, 16, 24, 24], "in_channels": 3,
    "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 4, "sample_size": 64,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 0.18215,
}  # fmt: skip
VAE_16 = {  # SD3's
    **VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305,
    "shift_factor": 0.0609, "latents_mean": None, "latents_std": None, "force_upcast": True,
}  # fmt: skip


def torch_shapes(module):
    """Name to shape of a module's parameters as torch has them."""
    return {
        name: (value.shape[0], value.shape[3], *value.shape[1:3]) if value.ndim == 4 else value.shape
        for name, value in tree_flatten(module.parameters())
    }


def tamed(tensors, gain):
    """Random tensors with smaller matrices, so that float32 tells five digits of what comes out: attentions do not hang
    on a last digit, and pictures lie about -1 and 1.
    """
    gains = {"SelfAttention.q.weight": 0.2, "shared.weight": 3, "conv_out.weight": 0.2}

    def of(name, value):
        return next((by for end, by in gains.items() if name.endswith(end)), gain if value.ndim > 1 else 1)

    return {name: value * np.float32(of(name, value)) for name, value in tensors.items()}


def clip_tensors(config, seed=0):
    kind = config["architectures"][0]
    return tamed(random_tensors(torch_shapes(CLIPText({**config, "_class_name": kind})), seed), 0.5)


def t5_tensors(config, seed=0):
    return tamed(random_tensors(needed_shapes(config, SHARED), seed), 0.5)


def vae_tensors(config, seed=0):
    return tamed(random_tensors(torch_shapes(AutoencoderKL(config)), seed), 1)


def write_json(path, said):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said), encoding="utf-8")


def write_component(folder, component, config, tensors, stem="model", dtype=mx.float32):
    """A component's config and weights, and its name in model_index.json."""
    write_json(folder / component / "config.json", config)
    arrays = {name: mx.array(value).astype(dtype) for name, value in tensors.items()}
    mx.save_safetensors(str(folder / component / f"{stem}.safetensors"), arrays, metadata={"format": "pt"})
    name_component(folder, component, config.get("_class_name") or config["architectures"][0])


def name_component(folder, component, kind):
    index = folder / "model_index.json"
    said = json.loads(index.read_text()) if index.is_file() else {"_class_name": "StableDiffusionPipeline"}
    library = "transformers" if kind.startswith(("CLIP", "T5")) else "diffusers"
    write_json(index, {**said, component: [library, kind]})


def write_clip(folder, component, config=CLIP_L, seed=0, **options):
    write_component(folder, component, config, clip_tensors(config, seed), **options)


def write_t5(folder, component, config=T5, seed=0, **options):
    write_component(folder, component, config, t5_tensors(config, seed), **options)


def write_vae(folder, component="vae", config=VAE, seed=0, **options):
    write_component(folder, component, config, vae_tensors(config, seed), stem="diffusion_pytorch_model", **options)


def write_clip_tokenizer(folder, component="tokenizer", pad=END):
    """CLIP's files as the hub has them; ``pad`` is "!" for CLIP-G."""
    place = folder / component
    write_json(place / "vocab.json", {word: index for index, word in enumerate(WORDS)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (place / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    roles = {"bos_token": {"content": BEGIN, **flags}, "eos_token": {"content": END, **flags}, "pad_token": pad}
    write_json(place / "special_tokens_map.json", {**roles, "unk_token": {"content": END, **flags}})
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": END, "do_lower_case": True}
    write_json(place / "tokenizer_config.json", settings)
    name_component(folder, component, "CLIPTokenizer")


def pieces(pad_id=0):
    """The bytes of a spiece.model with T5's special tokens."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=out, vocab_size=100, model_type="unigram", minloglevel=2,
        hard_vocab_limit=False, pad_id=pad_id, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", num_threads=1,
    )  # fmt: skip
    return out.getvalue()


def write_t5_tokenizer(folder, component="tokenizer"):
    """T5's files as PixArt has them: a spiece.model, no tokenizer.json."""
    write_json(
        folder / component / "tokenizer_config.json",
        {"tokenizer_class": "T5Tokenizer", "extra_ids": EXTRA_IDS, "model_max_length": 512},
    )
    (folder / component / "spiece.model").write_bytes(pieces())
    name_component(folder, component, "T5Tokenizer")


def random_ids(count, length, size=SIZE, seed=0):
    """Token ids of CLIP [count,length]: begin, words, the end at some place, and padding with the end token."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, size - 2, (count, length)).astype(np.int32)
    ids[:, 0] = size - 2
    for row, end in zip(ids, rng.integers(2, length, count), strict=True):
        row[end:] = size - 1
    return mx.array(ids)
