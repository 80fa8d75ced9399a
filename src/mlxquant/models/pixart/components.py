"""What stands around a PixArt's transformer: T5, which reads prompts, and the VAE, which makes pictures of latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx

from ...sampling.conditioning import Conditioning
from ..checkpoints.folder import DiffusersFolder
from ..checkpoints.source import Source
from ..parts.autoencoder import load_autoencoder
from ..parts.t5 import encode_t5
from ..parts.tokenizers import t5_tokenizer

KEPT = 256  # prompts, of 2 MB each in float32


class Components:
    """Text encoder and VAE of one place. Adapters that differ in the transformer alone share one of these.

    Both compute in float32, for T5 and Σ's VAE write numbers that float16 does not hold. The text encoder is in memory
    only while it encodes. Conditioning of the last ``KEPT`` prompts is kept, and of more
    where more were asked for at once.

    Attributes:
        place: The hub id or folder that they are loaded from.
        length: Tokens of a prompt.
    """

    def __init__(self, place: str, length: int):
        self.place, self.length = place, length
        self._encoded: dict[str, tuple[mx.array, mx.array]] = {}  # the last used last
        self._kept = KEPT

    @cached_property
    def source(self) -> Source:
        return DiffusersFolder(self.place)

    def encoded(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of prompts, in lower case and stripped: tokens [B,T,E] and mask [B,T], true where text is."""
        texts = [prompt.lower().strip() for prompt in prompts]
        if fresh := [text for text in dict.fromkeys(texts) if text not in self._encoded]:
            ids, mask = t5_tokenizer(self.source, "tokenizer")(fresh, self.length)
            tokens = encode_t5(self.source, "text_encoder", ids, mask, mx.float32)
            self._encoded |= {text: (tokens[row], mask[row] > 0) for row, text in enumerate(fresh)}
            mx.eval(list(self._encoded.values()))
        self._kept = max(self._kept, len(set(texts)))
        for text in texts:
            self._encoded[text] = self._encoded.pop(text)
        tokens, mask = (mx.stack([self._encoded[text][side] for text in texts]) for side in (0, 1))
        for text in list(self._encoded)[: -self._kept]:
            del self._encoded[text]
        return Conditioning(tokens=tokens, mask=mask)

    @cached_property
    def autoencoder(self) -> Any:
        return load_autoencoder(self.source, "vae", mx.float32)
