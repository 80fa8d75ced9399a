"""The conditional UNet of Stable Diffusion (arXiv 2112.10752) in MLX: diffusers' UNet2DConditionModel.

The module tree has diffusers' parameter names, pictures are channels-last. A block's parts are called one by one, by
``chain``, since a chain of stages needs every skip between them by name.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ...layers.attention import SoftmaxAttention
from ...layers.fast_cpu import gelu, silu
from ..parts.group_norm import GroupNorm
from ..parts.timesteps import time_features
from .config import CROSS_DOWN, CROSS_UP, UNetConfig

BLOCK_EPS, PROJECTION_EPS = 1e-5, 1e-6  # of layer norms, and of the group norm before a transformer


class TimeEmbedding(nn.Module):
    """Sinusoidal features of the timestep to what every residual block adds."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def __call__(self, features: mx.array) -> mx.array:
        return self.linear_2(silu(self.linear_1(features)))


class ResnetBlock(nn.Module):
    """Two convolutions, each of a normed and activated picture; the time is added between them."""

    def __init__(self, config: UNetConfig, read: int, out: int):
        super().__init__()
        self.norm1 = GroupNorm(config.norm_num_groups, read, config.norm_eps)
        self.conv1 = nn.Conv2d(read, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], out)
        self.norm2 = GroupNorm(config.norm_num_groups, out, config.norm_eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if read != out:
            self.conv_shortcut = nn.Conv2d(read, out, 1)

    def __call__(self, x: mx.array, time: mx.array) -> mx.array:
        """x [B,H,W,read], time [B,4C] to [B,H,W,out]."""
        y = self.conv1(silu(self.norm1(x))) + self.time_emb_proj(silu(time))[:, None, None]
        y = self.conv2(silu(self.norm2(y)))
        return (self.conv_shortcut(x) if "conv_shortcut" in self else x) + y


class Attention(nn.Module):
    """Attention of a picture's positions to each other, or to a text."""

    def __init__(self, width: int, read: int, heads: int):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(read, width, bias=False)
        self.to_v = nn.Linear(read, width, bias=False)
        self.to_out = [nn.Linear(width, width)]
        self.sdpa = SoftmaxAttention()
        self._heads = heads

    @property
    def heads(self) -> int:
        return self._heads

    def __call__(self, x: mx.array, read: mx.array) -> mx.array:
        """x [B,N,C] and what is read [B,M,R] to [B,N,C]."""

        def split(y: mx.array) -> mx.array:
            return y.reshape(*y.shape[:2], self._heads, -1).swapaxes(1, 2)

        y = self.sdpa(split(self.to_q(x)), split(self.to_k(read)), split(self.to_v(read)))
        return self.to_out[0](y.swapaxes(1, 2).reshape(x.shape))


class GEGLU(nn.Module):
    """Half of the channels times GELU of the other half (arXiv 2002.05202)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def __call__(self, x: mx.array) -> mx.array:
        y, gate = mx.split(self.proj(x), 2, axis=-1)
        return y * gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = [GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, read: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=BLOCK_EPS) for _ in range(3))
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, read, heads)
        self.ff = FeedForward(width)

    def __call__(self, x: mx.array, text: mx.array) -> mx.array:
        """x [B,N,C], text [B,T,E] to [B,N,C]."""
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks over a picture's positions, around which the picture goes on."""

    def __init__(self, config: UNetConfig, width: int, heads: int, depth: int):
        super().__init__()
        self.norm = GroupNorm(config.norm_num_groups, width, PROJECTION_EPS)
        linear = config.use_linear_projection
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = [TransformerBlock(width, config.cross_attention_dim, heads) for _ in range(depth)]
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def __call__(self, x: mx.array, text: mx.array) -> mx.array:
        """x [B,H,W,C], text [B,T,E] to [B,H,W,C]."""
        y = self.proj_in(self.norm(x))
        y = y.reshape(y.shape[0], -1, y.shape[-1])
        for block in self.transformer_blocks:
            y = block(y, text)
        return x + self.proj_out(y.reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def __call__(self, x: mx.array, height: int, width: int) -> mx.array:
        """x [B,H,W,C] to [B,height,width,C]: twice as large by the nearest neighbour, or one less where halving had
        rounded up.
        """
        x = mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(x[:, :height, :width])


class Block(nn.Module):
    """Residual blocks, after each perhaps a transformer; then perhaps a change of size, of which ``sampler`` is the
    name and the class.

    Args:
        config: The UNet's.
        widths: Channels that each residual block reads.
        out: Channels that each writes.
        attentions: After how many of them, from the first, a transformer follows.
        heads: Of its attention.
        depth: Transformer blocks of each.
        sampler: "downsamplers" or "upsamplers", or "" where the size stays.
    """

    def __init__(
        self, config: UNetConfig, widths: list[int], out: int, attentions: int, heads: int, depth: int, sampler: str
    ):
        super().__init__()
        self.resnets = [ResnetBlock(config, read, out) for read in widths]
        if attentions:
            self.attentions = [Transformer(config, out, heads, depth) for _ in range(attentions)]
        if sampler:
            self[sampler] = [(Downsample if sampler == "downsamplers" else Upsample)(out)]

    def pair(self, index: int, x: mx.array, time: mx.array, text: mx.array) -> mx.array:
        """A residual block, and the transformer after it: x [B,H,W,read] to [B,H,W,out]."""
        x = self.resnets[index](x, time)
        attentions = self.get("attentions", [])
        return attentions[index](x, text) if index < len(attentions) else x


class UNet(nn.Module):
    """The whole network. ``chain.unet_stages`` runs it."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self._config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        depths, heads = config.transformer_layers_per_block, config.attention_head_dim
        first, last = widths[0], len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first, 4 * first)
        self.down_blocks, skips, now = [], [first], first
        for i, out in enumerate(widths):
            read = [now] + [out] * (layers[i] - 1)
            crossed = layers[i] if config.down_block_types[i] == CROSS_DOWN else 0
            sampler = "downsamplers" if i < last else ""
            self.down_blocks.append(Block(config, read, out, crossed, heads[i], depths[i], sampler))
            skips += [out] * (layers[i] + bool(sampler))
            now = out
        self.mid_block = Block(config, [now, now], now, 1, heads[-1], depths[-1], "")
        self.up_blocks = []
        for i, out in enumerate(reversed(widths)):
            count = layers[last - i] + 1
            read = [(out if j else now) + skips.pop() for j in range(count)]
            crossed = count if config.up_block_types[i] == CROSS_UP else 0
            sampler = "upsamplers" if i < last else ""
            self.up_blocks.append(Block(config, read, out, crossed, heads[last - i], depths[last - i], sampler))
            now = out
        self.conv_norm_out = GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    @property
    def config(self) -> UNetConfig:
        return self._config

    def embed_time(self, t: mx.array) -> mx.array:
        """t [B] to [B,4C]."""
        config = self._config
        features = time_features(t, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
        return self.time_embedding(features)

    def head(self, x: mx.array) -> mx.array:
        """x [B,H,W,C] to the prediction [B,H,W,out]."""
        return self.conv_out(silu(self.conv_norm_out(x)))
