"""PixArt's diffusion transformer (arXiv 2310.00426; Σ: 2403.04692) in MLX, as diffusers' PixArtTransformer2DModel.

Parameter names are diffusers'; of the tensors only the patch embedder's convolution has another layout. Blocks share
one projection of time (adaLN-single, section 2.3): each adds a table of its own to what it writes. Text is read by
cross attention, whose queries see the stream as it is, without a norm.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...layers.attention import SoftmaxAttention
from ...layers.fast_cpu import gelu_tanh, silu
from ...numerics.arrays import Array
from ..mmdit.network import layer_norm, modulate, patch_tokens
from ..parts.timesteps import time_features
from .config import PixArtConfig

FEATURES = 256  # of a time, and of each size
EPS = 1e-6  # of the last norm


@lru_cache(maxsize=8)
def sincos_positions(width: int, rows: int, columns: int, base: int, scale: float) -> mx.array:
    """Sines and cosines of where tokens are: [rows * columns, width] float32, columns in the first half of the
    channels.

    Positions run from 0 to ``base / scale`` along each side, however many tokens there are: what was learned at one
    resolution is interpolated.
    """

    def along(count: int) -> Array:
        return (np.arange(count, dtype=np.float32) / (count / base) / scale).astype(np.float32)

    column, row = np.meshgrid(along(columns), along(rows), indexing="xy")
    quarter = width // 4
    rates = 1 / 10000 ** (np.arange(quarter) / quarter)
    angles = [np.outer(place.reshape(-1), rates) for place in (column, row)]
    parts = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return mx.array(np.concatenate(parts, axis=1).astype(np.float32))


class PatchEmbed(nn.Module):
    """Latents [B,H,W,C] to tokens [B,N,D] with their positions."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, config.patch_size)
        self._base, self._scale = config.sample_size // config.patch_size, float(config.interpolation_scale or 1)

    def __call__(self, latent: mx.array) -> mx.array:
        x = self.proj(latent)
        b, rows, columns, width = x.shape
        return x.reshape(b, -1, width) + sincos_positions(width, rows, columns, self._base, self._scale)


class Embedding(nn.Module):
    """Sinusoidal features of numbers [B], then an MLP: [B,D]."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(FEATURES, width), nn.Linear(width, width)

    def __call__(self, numbers: mx.array) -> mx.array:
        return self.linear_2(silu(self.linear_1(time_features(numbers, FEATURES))))


class TimeAndSize(nn.Module):
    """What a picture is conditioned on besides text: the time, and where the model reads them its resolution and its
    aspect ratio.
    """

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.timestep_embedder = Embedding(config.width)
        self._sized = bool(config.use_additional_conditions)
        if self._sized:
            self.resolution_embedder = Embedding(config.width // 3)
            self.aspect_ratio_embedder = Embedding(config.width // 3)

    def __call__(self, t: mx.array, height: int, width: int) -> mx.array:
        """t [B] and a picture's sides in pixels to [B,D]."""
        c = self.timestep_embedder(t)
        if not self._sized:
            return c
        sides = self.resolution_embedder(mx.array([height, width], mx.float32)).reshape(1, -1)
        return c + mx.concatenate([sides, self.aspect_ratio_embedder(mx.array([height / width], mx.float32))], axis=1)


class AdaLayerNormSingle(nn.Module):
    """The one projection of time that all blocks share."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.emb = TimeAndSize(config)
        self.linear = nn.Linear(config.width, 6 * config.width)

    def __call__(self, t: mx.array, height: int, width: int) -> tuple[mx.array, mx.array]:
        """What blocks add their tables to [B,6,D], and what it is projected from [B,D]."""
        c = self.emb(t, height, width)
        return self.linear(silu(c)).reshape(len(c), 6, -1), c


class TextProjection(nn.Module):
    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.linear_1, self.linear_2 = (
            nn.Linear(read, config.width) for read in (config.caption_channels, config.width)
        )

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.linear_2(gelu_tanh(self.linear_1(tokens)))


class Attention(nn.Module):
    """Queries of one sequence [B,N,D], keys and values of another [B,M,D]."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        d, bias = config.width, config.attention_bias
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, d, bias=bias) for _ in range(3))
        self.to_out = [nn.Linear(d, d)]  # of a list, as diffusers has it
        self.sdpa = SoftmaxAttention()
        self._heads = config.num_attention_heads

    def __call__(self, x: mx.array, read: mx.array, mask: mx.array | None = None) -> mx.array:
        q, k, v = (
            y.reshape(*y.shape[:2], self._heads, -1).transpose(0, 2, 1, 3)
            for y in (self.to_q(x), self.to_k(read), self.to_v(read))
        )
        return self.to_out[0](self.sdpa(q, k, v, mask=mask).transpose(0, 2, 1, 3).reshape(x.shape))


class GELU(nn.Module):
    def __init__(self, width: int, wide: int):
        super().__init__()
        self.proj = nn.Linear(width, wide)

    def __call__(self, x: mx.array) -> mx.array:
        return gelu_tanh(self.proj(x))


class FeedForward(nn.Module):
    """An MLP under diffusers' names: what stands second there drops nothing while a model draws."""

    def __init__(self, width: int):
        super().__init__()
        self.net = [GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Self-attention, cross attention to text, MLP; the first and the last are modulated by time."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.attn1, self.attn2 = Attention(config), Attention(config)
        self.ff = FeedForward(config.width)
        self.scale_shift_table = mx.random.normal((6, config.width)) / config.width**0.5
        self._eps = config.norm_eps

    def __call__(self, image: mx.array, text: mx.array, mask: mx.array, time: mx.array) -> mx.array:
        """image [B,N,D], text [B,T,D], mask [B,1,1,T] true where text is, time [B,6,D]; returns the image."""
        shift1, scale1, gate1, shift2, scale2, gate2 = mx.split(self.scale_shift_table + time, 6, axis=1)
        x = modulate(layer_norm(image, self._eps), shift1, scale1)
        image = image + gate1 * self.attn1(x, x)
        image = image + self.attn2(image, text, mask)
        return image + gate2 * self.ff(modulate(layer_norm(image, self._eps), shift2, scale2))


class PixArt(nn.Module):
    """The whole transformer."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self._config = config
        self.pos_embed = PatchEmbed(config)
        self.adaln_single = AdaLayerNormSingle(config)
        self.caption_projection = TextProjection(config)
        self.transformer_blocks = [Block(config) for _ in range(config.num_layers)]
        self.scale_shift_table = mx.random.normal((2, config.width)) / config.width**0.5
        assert config.out_channels is not None
        self.proj_out = nn.Linear(config.width, config.patch_size**2 * config.out_channels)

    @property
    def config(self) -> PixArtConfig:
        return self._config

    def embed(
        self, latent: mx.array, tokens: mx.array, t: mx.array, height: int, width: int
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """What blocks read.

        Args:
            latent: [B,H,W,C].
            tokens: Of the text encoder [B,T,E].
            t: Times [B].
            height: Of the picture, in pixels.
            width: Of the picture, in pixels.

        Returns:
            image [B,N,D], text [B,T,D], time [B,6,D], and what the head reads of the time [B,D].
        """
        time, c = self.adaln_single(t, height, width)
        return self.pos_embed(latent), self.caption_projection(tokens), time, c

    def head(self, image: mx.array, c: mx.array, height: int, width: int) -> mx.array:
        """image [B,N,D] and c [B,D] to a prediction [B,H,W,C] for latents of these sides."""
        shift, scale = mx.split(self.scale_shift_table + c[:, None], 2, axis=1)
        tokens = self.proj_out(modulate(layer_norm(image, EPS), shift, scale))
        return patch_tokens(tokens, self._config.patch_size, height, width)

    def __call__(
        self, latent: mx.array, tokens: mx.array, mask: mx.array, t: mx.array, height: int, width: int
    ) -> mx.array:
        """See ``embed``; mask [B,T] is true where text is. Returns the prediction [B,H,W,C]."""
        image, text, time, c = self.embed(latent, tokens, t, height, width)
        for block in self.transformer_blocks:
            image = block(image, text, mask[:, None, None], time)
        return self.head(image, c, latent.shape[1], latent.shape[2])
