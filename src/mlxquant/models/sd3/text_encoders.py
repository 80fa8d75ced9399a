"""SD3's text conditioning: the last but one hidden states of two CLIPs, side by side, before T5's last, and both CLIPs'
pooled outputs; each encoder is in memory only while it encodes.

T5 may be missing. Then its tokens are zeros, as in diffusers: the model was trained with each encoder dropped at times.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from ...errors import ArtifactError
from ...sampling.conditioning import Conditioning
from ..checkpoints.folder import INDEX
from ..checkpoints.source import Source
from ..parts.clip import load_clip
from ..parts.t5 import encode_t5
from ..parts.tokenizers import clip_tokenizer, t5_tokenizer

CLIPS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
T5, T5_TOKENIZER = "text_encoder_3", "tokenizer_3"
T5_TOKENS = 256  # diffusers' max_sequence_length; the text is not masked, padding included
CHUNK = 8  # prompts that go through a CLIP at once

log = logging.getLogger("mlxquant")


def encode(source: Source, prompts: Sequence[str], width: int, dtype: mx.Dtype) -> Conditioning:
    """What SD3 reads of prompts.

    Args:
        source: Where the model is.
        prompts: B of them.
        width: Channels of a text token.
        dtype: Of weights and results.

    Returns:
        Token embeddings [B, 77 + 256, width] and pooled embeddings [B,P].

    Raises:
        ArtifactError: A file is missing or damaged, or the encoders are of another model.
        AdapterError: Without the packages tokenizers or sentencepiece.
    """
    long = has_t5(source)
    log.info("text encoders for %d prompts: %.2f GB in use", len(prompts), mx.get_active_memory() / 1e9)
    if not long:
        log.warning("%s has no %s (T5): drawing without it, as diffusers does", source.place, T5)
    hidden, pooled = zip(*(_clip(source, *names, prompts, dtype) for names in CLIPS), strict=True)
    tokens = mx.concatenate(list(hidden), axis=-1)
    if long:
        ids, _ = t5_tokenizer(source, T5_TOKENIZER)(prompts, T5_TOKENS)
        after = encode_t5(source, T5, ids, None, dtype)
    else:
        after = mx.zeros((len(prompts), T5_TOKENS, width), dtype=dtype)
    if tokens.shape[-1] > width or after.shape[-1] != width:
        raise ArtifactError(
            f"{source.place}: its CLIPs and T5 write {tokens.shape[-1]} and {after.shape[-1]} channels, and the"
            f" transformer reads {width}; the encoders are another model's"
        )
    tokens = mx.pad(tokens, [(0, 0), (0, 0), (0, width - tokens.shape[-1])])
    found = Conditioning(tokens=mx.concatenate([tokens, after], axis=1), pooled=mx.concatenate(list(pooled), axis=-1))
    mx.eval({**found})
    mx.clear_cache()
    log.info("text encoders released: %.2f GB in use", mx.get_active_memory() / 1e9)
    return found


def has_t5(source: Source) -> bool:
    """Whether a copy has T5: who leaves its folder out of a local one, of 9 to 19 GB, means to draw without it."""
    folder = Path(source.place)
    return source.has(T5) and ((folder / T5).is_dir() or not (folder / INDEX).is_file())


def _clip(
    source: Source, component: str, tokenizer: str, prompts: Sequence[str], dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Hidden states before the last layer [B,77,D] and pooled output [B,P] of one CLIP."""
    ids = clip_tokenizer(source, tokenizer)(prompts)
    model, found = load_clip(source, component, dtype), list[tuple[mx.array, mx.array]]()
    for start in range(0, len(prompts), CHUNK):
        said = model(ids[start : start + CHUNK])
        found.append((said.penultimate, said.pooled))
        mx.eval(found[-1])
    hidden, pooled = zip(*found, strict=True)
    return mx.concatenate(list(hidden)), mx.concatenate(list(pooled))
