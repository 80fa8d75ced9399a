"""The autoencoder of latent diffusion (AutoencoderKL, arXiv 2112.10752) in MLX, with diffusers' parameter names.

SD1.5, PixArt, SD3 and FLUX differ in the channels of their latents, in how these are scaled and shifted, and in the
1x1 convolutions around them, which newer ones have not. Memory is bounded: the attention in the middle takes some
queries at a time, convolutions on the CPU are unfolded in strips, and big pictures go in tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...errors import AdapterError
from ...layers.fast_cpu import silu
from ...numerics.convolution import convolved
from .group_norm import GroupNorm
from .tiles import in_tiles

EPSILON = 1e-6  # of all of its normalisations
WHOLE = 128  # up to so many places a side, a picture of 1024 x 1024 pixels, latents are decoded whole
SCORES = 2**25  # of the attention in the middle at once


class Conv(nn.Conv2d):
    """MLX's convolution, in strips on the CPU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int | None = None):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2 if padding is None else padding)

    def __call__(self, x: mx.array) -> mx.array:
        return convolved(x, self.weight, self.bias, self.stride[0], self.padding)


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, inputs, EPSILON), Conv(inputs, outputs)
        self.norm2, self.conv2 = GroupNorm(groups, outputs, EPSILON), Conv(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = Conv(inputs, outputs, 1)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.conv1(silu(self.norm1(x)))
        y = self.conv2(silu(self.norm2(y)))
        return (self.conv_shortcut(x) if "conv_shortcut" in self else x) + y


class Attention(nn.Module):
    """One head over all places."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, width, EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = [nn.Linear(width, width)]

    def __call__(self, x: mx.array) -> mx.array:
        flat = self.group_norm(x).reshape(x.shape[0], 1, -1, x.shape[-1])
        q, k, v = self.to_q(flat), self.to_k(flat), self.to_v(flat)
        rows = max(1, SCORES // (k.shape[0] * k.shape[2]))
        found = []
        for start in range(0, q.shape[2], rows):
            some = q[:, :, start : start + rows]
            found.append(mx.fast.scaled_dot_product_attention(some, k, v, scale=q.shape[-1] ** -0.5))
            mx.eval(found[-1])
        return x + self.to_out[0](mx.concatenate(found, axis=2)).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int, attends: bool):
        super().__init__()
        self.resnets = [ResnetBlock(width, width, groups) for _ in range(2)]
        self.attentions = [Attention(width, groups)] if attends else []

    def __call__(self, x: mx.array) -> mx.array:
        x = self.resnets[0](x)
        for layer in self.attentions:
            x = layer(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Half the places, of a picture with a row and a column of zeros behind it."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv(width, width, stride=2, padding=0)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Every place four times, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))


class Level(nn.Module):
    """Residual blocks at one resolution, then the way to the next, a list of one layer or none."""

    def __init__(self, inputs: int, outputs: int, count: int, groups: int):
        super().__init__()
        self.resnets = [ResnetBlock(outputs if index else inputs, outputs, groups) for index in range(count)]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.resnets:
            x = block(x)
        for layer in (*self.get("downsamplers", ()), *self.get("upsamplers", ())):
            x = layer(x)
        return x


class Coder(nn.Module):
    """What the encoder and the decoder have in common: the first and the last convolution."""

    def __init__(self, config: dict[str, Any], inputs: int, first: int, last: int, outputs: int):
        super().__init__()
        self.conv_in = Conv(inputs, first)
        groups, widest = groups_of(config), config["block_out_channels"][-1]
        self.mid_block = MidBlock(widest, groups, config.get("mid_block_add_attention", True))
        self.conv_norm_out = GroupNorm(groups, last, EPSILON)
        self.conv_out = Conv(last, outputs)

    def finish(self, x: mx.array) -> mx.array:
        return self.conv_out(silu(self.conv_norm_out(x)))


class Encoder(Coder):
    """Pictures [B,H,W,3] to moments of latents [B,H/f,W/f,2C]."""

    def __init__(self, config: dict[str, Any]):
        widths = config["block_out_channels"]
        super().__init__(config, config.get("in_channels", 3), widths[0], widths[-1], 2 * config["latent_channels"])
        self.down_blocks = []
        for index, width in enumerate(widths):
            level = Level(widths[max(0, index - 1)], width, config.get("layers_per_block", 1), groups_of(config))
            if index < len(widths) - 1:
                level.downsamplers = [Downsample(width)]
            self.down_blocks.append(level)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.finish(self.mid_block(x))


class Decoder(Coder):
    """Latents [B,h,w,C] to pictures [B,f h,f w,3]."""

    def __init__(self, config: dict[str, Any]):
        widths = config["block_out_channels"][::-1]
        super().__init__(config, config["latent_channels"], widths[0], widths[-1], config.get("out_channels", 3))
        self.up_blocks = []
        for index, width in enumerate(widths):
            level = Level(widths[max(0, index - 1)], width, config.get("layers_per_block", 1) + 1, groups_of(config))
            if index < len(widths) - 1:
                level.upsamplers = [Upsample(width)]
            self.up_blocks.append(level)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.finish(x)


def groups_of(config: dict[str, Any]) -> int:
    return int(config.get("norm_num_groups", 32))


class AutoencoderKL(nn.Module):
    """An autoencoder; its sizes are those of a config of diffusers.

    Attributes:
        factor: Pixels of a picture's side, for one place of a latent.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        latent = config["latent_channels"]
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        if config.get("use_quant_conv", True):
            self.quant_conv = Conv(2 * latent, 2 * latent, 1)
        if config.get("use_post_quant_conv", True):
            self.post_quant_conv = Conv(latent, latent, 1)
        self._scale, self._shift = config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0
        self.factor: int = 2 ** (len(config["block_out_channels"]) - 1)

    def decode(self, latent: mx.array, tile: int | None = None) -> mx.array:
        """Pictures of latents, one after the other.

        Args:
            latent: As the sampler has them, scaled and shifted [B,H,W,C].
            tile: Side of a tile in places of the latent, whatever the size; None for the whole where that is at most
                128 x 128 places, and for tiles of 128 beyond, see ``in_tiles``.

        Returns:
            [B,f H,f W,3] in the weights' dtype, in [-1,1] but for what a decoder overshoots, which is not cut.

        Raises:
            AdapterError: Latents of other channels.
        """
        self._check(latent, self.decoder.conv_in, "a latent")
        z = latent.astype(self.decoder.conv_in.weight.dtype) / self._scale + self._shift
        return self._one_by_one(self._decoded, z, WHOLE, tile, self.factor)

    def encode(self, pictures: mx.array, tile: int | None = None) -> mx.array:
        """The means of the latents of pictures, as the sampler has them, scaled and shifted.

        Args:
            pictures: [B,H,W,3] in [-1,1], of sides that ``factor`` divides.
            tile: Side of a tile in places of the latent, as in ``decode``.

        Returns:
            [B,H/f,W/f,C].

        Raises:
            AdapterError: Pictures of other channels or sides.
        """
        self._check(pictures, self.encoder.conv_in, "a picture")
        if pictures.shape[1] % self.factor or pictures.shape[2] % self.factor:
            raise AdapterError(
                f"a picture of {pictures.shape[2]}x{pictures.shape[1]} pixels, and the autoencoder takes multiples of"
                f" {self.factor}; cut or resize it"
            )
        x = pictures.astype(self.encoder.conv_in.weight.dtype)
        moments = self._one_by_one(self._encoded, x, WHOLE * self.factor, tile and tile * self.factor, 1 / self.factor)
        mean, _ = mx.split(moments, 2, axis=-1)
        return (mean - self._shift) * self._scale

    def _check(self, x: mx.array, first: nn.Conv2d, what: str) -> None:
        if x.ndim != 4 or x.shape[-1] != first.weight.shape[-1]:
            raise AdapterError(f"{what} of shape {x.shape}, and the autoencoder takes [B,H,W,{first.weight.shape[-1]}]")

    def _one_by_one(
        self, function: Callable[[mx.array], mx.array], x: mx.array, whole: int, tile: int | None, ratio: float
    ) -> mx.array:
        found = []
        for start in range(x.shape[0]):
            one = x[start : start + 1]
            if tile is None and one.shape[1] * one.shape[2] <= whole**2:
                found.append(function(one))
            else:
                side = tile or whole
                found.append(in_tiles(function, one, side, round(side * ratio)))
            mx.eval(found[-1])
            mx.clear_cache()
        return mx.concatenate(found)

    def _decoded(self, z: mx.array) -> mx.array:
        return self.decoder(self.post_quant_conv(z) if "post_quant_conv" in self else z)

    def _encoded(self, x: mx.array) -> mx.array:
        moments = self.encoder(x)
        return self.quant_conv(moments) if "quant_conv" in self else moments
