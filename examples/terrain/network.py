"""The UNet: noise and a difficulty to a height map, in one step.

Modules have the names that they have in OpenAI's code and in the trained file. Pictures are [B,H,W,C], as everywhere in
MLX.
"""

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

GROUPS = 32  # of channels, in every normalization
HEAD = 32  # channels of a head of attention
FEATURES = 32  # of the noise level, that its embedding is made from
SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0  # of the training data, of the least noise, of noise alone


def group_norm(channels):
    return nn.GroupNorm(GROUPS, channels, pytorch_compatible=True)


def attention(q, k, v):
    """Of q, k and v [B,heads,places,channels]."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)


def through(layers, x):
    for layer in layers:
        x = layer(x)
    return x


class AverageDown(nn.Module):
    """Half the size, by the average of every 2×2 places."""

    def __call__(self, x):
        B, H, W, C = x.shape
        return x.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))


class NearestUp(nn.Module):
    """Twice the size, by repeating every place."""

    def __call__(self, x):
        B, H, W, C = x.shape
        return mx.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)


class ResBlock(nn.Module):
    """Two convolutions around a scale and a shift that say how much noise there is and how difficult it shall be.

    Args:
        channels: Of the input.
        out: Of the output; where it is another number, a convolution of one place is what the rest is added to.
        embedding: The width of the embedding.
        resized: ``AverageDown`` or ``NearestUp`` for another size.
    """

    def __init__(self, channels, out, embedding, resized=None):
        super().__init__()
        self.in_layers = [group_norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)]
        self.emb_layers = [nn.SiLU(), nn.Linear(embedding, 2 * out)]
        self.out_layers = [group_norm(out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1)]
        self.resized = nn.Identity() if resized is None else resized
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def __call__(self, x, embedding):
        """x [B,H,W,channels] and embedding [B,embedding] to [B,H',W',out]."""
        *before, convolution = self.in_layers
        h = convolution(self.resized(through(before, x)))
        scale, shift = mx.split(through(self.emb_layers, embedding)[:, None, None], 2, axis=-1)
        norm, *after = self.out_layers
        h = through(after, norm(h) * (1 + scale) + shift)
        return self.skip_connection(self.resized(x)) + h


class AttentionBlock(nn.Module):
    """Attention of every place to every place, in heads of 32 channels, added to what came in."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def __call__(self, x):
        B, H, W, C = x.shape
        heads = self.qkv(self.norm(x)).reshape(B, H * W, 3, C // HEAD, HEAD)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)
        return x + self.proj_out(attention(q, k, v).swapaxes(1, 2).reshape(B, H, W, C))


class Block(nn.Module):
    """Layers one after the other, on x, or on the channels of x and of ``skip``."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def __call__(self, x, embedding, skip=None):
        if skip is not None:
            x = mx.concatenate([x, skip], axis=-1)
        for layer in self.layers:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """Down in steps of one half, and up again with what was there on the way down.

    Args:
        widths: Channels of each size, the whole picture first; multiples of 32.
        depth: Blocks of each size.
        attending: The sizes that attend, counted from the whole picture's, 0.
        embedding: The width of the embedding.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 32, 64, 96, 128),
        depth: int = 4,
        attending: Sequence[int] = (2, 3, 4),
        embedding: int = 128,
    ):
        super().__init__()
        self.time_embed = [nn.Linear(FEATURES, embedding), nn.SiLU(), nn.Linear(embedding, embedding)]
        self.label_emb = [nn.Linear(1, embedding), nn.SiLU(), nn.Linear(embedding, embedding)]

        def block(channels, out, size, last=None):
            layers = [ResBlock(channels, out, embedding), *([AttentionBlock(out)] if size in attending else [])]
            return Block(layers if last is None else [*layers, ResBlock(out, out, embedding, last())])

        channels = widths[0]
        self.input_blocks, kept = [Block([nn.Conv2d(1, channels, 3, padding=1)])], [channels]
        for size, width in enumerate(widths):
            for _ in range(depth):
                self.input_blocks.append(block(channels, width, size))
                channels = width
                kept.append(channels)
            if size + 1 < len(widths):
                self.input_blocks.append(Block([ResBlock(channels, channels, embedding, AverageDown())]))
                kept.append(channels)
        self.middle_block = Block(
            [ResBlock(channels, channels, embedding), AttentionBlock(channels), ResBlock(channels, channels, embedding)]
        )
        self.output_blocks = []
        for size, width in reversed(list(enumerate(widths))):
            for number in range(depth + 1):
                up = NearestUp if size and number == depth else None
                self.output_blocks.append(block(channels + kept.pop(), width, size, up))
                channels = width
        self.out = [group_norm(channels), nn.SiLU(), nn.Conv2d(channels, 1, 3, padding=1)]

    def __call__(self, x, times, difficulty):
        """x [B,H,W,1], times [B] and difficulty [B] in [0,1] to [B,H,W,1]."""
        half = FEATURES // 2
        angles = times[:, None] * mx.exp(mx.arange(half) * (-math.log(10000) / half))
        features = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)
        embedding = through(self.time_embed, features) + through(self.label_emb, difficulty[:, None])
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for block in self.output_blocks:
            x = block(x, embedding, skips.pop())
        return through(self.out, x)


class Denoiser(nn.Module):
    """A consistency model: noisy pictures to clean ones, whatever the noise.

    Source: arXiv:2303.01469, eq. 5, in the scaling of its appendix C.
    """

    def __init__(self, network: UNet):
        super().__init__()
        self.network = network

    def __call__(self, noisy, sigma, difficulty):
        """noisy [B,H,W,1] with noise of deviation sigma [B], difficulty [B] in [0,1], to clean [B,H,W,1] in [-1,1]."""
        total = mx.sqrt(sigma**2 + SIGMA_DATA**2)
        skip = SIGMA_DATA**2 / ((sigma - SIGMA_MIN) ** 2 + SIGMA_DATA**2)
        gain = SIGMA_DATA * (sigma - SIGMA_MIN) / total
        in_all = (slice(None), None, None, None)
        drawn = self.network(noisy / total[in_all], 250 * mx.log(sigma), difficulty)
        return mx.clip(gain[in_all] * drawn + skip[in_all] * noisy, -1, 1)
