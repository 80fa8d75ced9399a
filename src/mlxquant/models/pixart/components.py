"""What stands around a PixArt's transformer: T5, which reads prompts, and the VAE, which makes pictures of latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from ...sampling.conditioning import Conditioning
from ..latent import Components
from ..parts.t5 import encode_t5
from ..parts.tokenizers import t5_tokenizer


class PixArtComponents(Components):
    """Both compute in float32, for T5 and Σ's autoencoder write numbers that float16 does not hold.

    Args:
        place: The hub id or folder that they are loaded from.
        length: Tokens of a prompt.
    """

    def __init__(self, place: str, length: int):
        super().__init__(place)
        self.length = length

    def at(self, place: str) -> Self:
        return type(self)(place, self.length)

    def _encode(self, prompts: list[str]) -> Conditioning:
        ids, mask = t5_tokenizer(self.source, "tokenizer")(prompts, self.length)
        tokens = encode_t5(self.source, "text_encoder", ids, mask, mx.float32)
        return Conditioning(tokens=tokens, mask=mask > 0)

    def encoded(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of prompts, in lower case and stripped: tokens [B,T,E] float32 and mask [B,T], true where text
        is.
        """
        return super().encoded([prompt.lower().strip() for prompt in prompts])
