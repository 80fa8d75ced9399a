"""Random CLIP and T5 text encoders with working tokenizers, in the files that Stable Diffusion 3 comes in."""

from __future__ import annotations

import io
import json
import math
import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import mlxquant  # noqa: F401  # before mlx

# isort: split
from mlxquant.models.shapes.scenes import captions
from random_tensors import Tensor, linear, norm

TOKEN = 4096  # width of the text tokens, a literal in DiffusionKit
EXTRA = 100  # T5's sentinels, which its tokenizer adds to the pieces of spiece.model
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class ClipSizes:
    """A CLIP text encoder; as many pooled channels as hidden ones."""

    hidden: int
    layers: int
    heads: int
    activation: str
    vocabulary: int


@dataclass(frozen=True)
class T5Sizes:
    """A T5 encoder; its hidden size is that of the text tokens."""

    layers: int
    heads: int
    head: int
    feed_forward: int
    vocabulary: int


def clip(sizes: ClipSizes) -> Iterator[Tensor]:
    """A CLIP text encoder with projection, under the names of transformers."""
    d, prefix = sizes.hidden, "text_model."
    yield Tensor(f"{prefix}embeddings.token_embedding.weight", (sizes.vocabulary, d), 0.5)
    yield Tensor(f"{prefix}embeddings.position_embedding.weight", (77, d), 0.2)
    for index in range(sizes.layers):
        name = f"{prefix}encoder.layers.{index}"
        for part in ("q", "k", "v"):
            yield from linear(f"{name}.self_attn.{part}_proj", d, d)
        yield from linear(f"{name}.self_attn.out_proj", d, d, 0.3, bias=0.03)
        yield from linear(f"{name}.mlp.fc1", 4 * d, d)
        yield from linear(f"{name}.mlp.fc2", d, 4 * d, 0.3, bias=0.03)
        yield from norm(f"{name}.layer_norm1", d)
        yield from norm(f"{name}.layer_norm2", d)
    yield from norm(f"{prefix}final_layer_norm", d)
    yield Tensor("text_projection.weight", (d, d), 1 / math.sqrt(d))


def t5(sizes: T5Sizes) -> Iterator[Tensor]:
    """T5's encoder, without biases; its queries are not divided by the root of the head size, so their weights are
    smaller.
    """
    inner = sizes.heads * sizes.head
    for name in ("shared", "encoder.embed_tokens"):
        yield Tensor(f"{name}.weight", (sizes.vocabulary, TOKEN), 1.0)
    yield Tensor("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, sizes.heads), 1.0)
    for index in range(sizes.layers):
        name = f"encoder.block.{index}.layer"
        shapes = {"q": (inner, TOKEN), "k": (inner, TOKEN), "v": (inner, TOKEN), "o": (TOKEN, inner)}
        for part, shape in shapes.items():
            gain = 1 / math.sqrt(sizes.head) if part == "q" else 1.0
            yield Tensor(f"{name}.0.SelfAttention.{part}.weight", shape, gain / math.sqrt(shape[1]))
        shapes = {
            "wi_0": (sizes.feed_forward, TOKEN),
            "wi_1": (sizes.feed_forward, TOKEN),
            "wo": (TOKEN, sizes.feed_forward),
        }
        for part, shape in shapes.items():
            yield Tensor(f"{name}.1.DenseReluDense.{part}.weight", shape, 1 / math.sqrt(shape[1]))
        for part in ("0", "1"):
            yield Tensor(f"{name}.{part}.layer_norm.weight", (TOKEN,), 0.1, mean=1.0)
    yield Tensor("encoder.final_layer_norm.weight", (TOKEN,), 0.02, mean=0.2)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, facts: Any) -> None:
    write_text(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def byte_symbols() -> list[str]:
    """CLIP's printable symbols for the 256 bytes, in its order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def letter_merges() -> Iterator[tuple[str, str]]:
    """Merges of all sequences of letters, inside a word and at its end, the shorter ones first."""
    for length in (1, 2, 3):
        for *first, last in product(string.ascii_lowercase, repeat=length + 1):
            yield "".join(first), last
            yield "".join(first), f"{last}</w>"


def write_clip_tokenizer(folder: Path, vocabulary: int) -> None:
    """``vocab.json`` and ``merges.txt`` with CLIP's structure: symbols, symbols that end a word, merges, markers.
    DiffusionKit finds the end of a prompt as its largest id, so the end marker is the last.
    """
    symbols = byte_symbols()
    merges = list(islice(letter_merges(), vocabulary - 2 * len(symbols) - 2))
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
    write_json(folder / "vocab.json", {word: index for index, word in enumerate(words)})
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")


def write_clip_config(path: Path, sizes: ClipSizes) -> None:
    facts = {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "hidden_size": sizes.hidden,
        "projection_dim": sizes.hidden,
        "intermediate_size": 4 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": 77,
        "vocab_size": sizes.vocabulary,
        "hidden_act": sizes.activation,
    }
    write_json(path, facts)


def write_t5_config(folder: Path, sizes: T5Sizes) -> None:
    """``config.json`` and the tokenizer: a unigram model of the embedded model's captions in which every printable
    character is known.
    """
    import sentencepiece

    facts = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": TOKEN,
        "d_kv": sizes.head,
        "d_ff": sizes.feed_forward,
        "num_layers": sizes.layers,
        "num_heads": sizes.heads,
        "vocab_size": sizes.vocabulary,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    write_json(folder / "config.json", facts)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions(held_out=False, count=500)),
        model_writer=model,
        model_type="unigram",
        vocab_size=sizes.vocabulary - EXTRA,
        hard_vocab_limit=False,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {**special, "extra_ids": EXTRA, "tokenizer_class": "T5Tokenizer"})
