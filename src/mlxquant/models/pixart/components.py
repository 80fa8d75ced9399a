"""What stands around a PixArt's transformer: T5, which reads prompts, and the VAE, which makes pictures of latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import mlx.core as mx

from ...sampling.conditioning import Conditioning
from ..checkpoints.open import open_source
from ..checkpoints.source import Source
from ..parts.autoencoder import AutoencoderKL, load_autoencoder
from ..parts.t5 import encode_t5
from ..parts.tokenizers import t5_tokenizer
from ..prompt_memory import PromptMemory


class Components:
    """Text encoder and autoencoder of one place. Adapters that differ in the transformer alone share one of these.

    Both compute in float32, for T5 and Σ's autoencoder write numbers that float16 does not hold. The text encoder is in
    memory only while it encodes.

    Args:
        place: The hub id or folder that they are loaded from.
        length: Tokens of a prompt.

    Attributes:
        text: What encodes prompts: the model's own encoder, or whatever is put here.
    """

    def __init__(self, place: str, length: int):
        self.place, self.length = place, length
        self.text: Callable[[list[str]], Conditioning] = self._encode
        self._memory = PromptMemory()

    @cached_property
    def source(self) -> Source:
        return open_source(self.place)

    def _encode(self, prompts: list[str]) -> Conditioning:
        ids, mask = t5_tokenizer(self.source, "tokenizer")(prompts, self.length)
        tokens = encode_t5(self.source, "text_encoder", ids, mask, mx.float32)
        return Conditioning(tokens=tokens, mask=mask > 0)

    def encoded(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of prompts, in lower case and stripped: tokens [B,T,E] float32 and mask [B,T], true where text
        is.
        """
        return self._memory.encoded([prompt.lower().strip() for prompt in prompts], self.text)

    @cached_property
    def autoencoder(self) -> AutoencoderKL:
        return load_autoencoder(self.source, "vae", mx.float32)
