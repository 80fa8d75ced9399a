"""SD3's multimodal diffusion transformer (MMDiT, arXiv 2403.03206 section 4) in MLX.

Parameter names and tensor layouts are DiffusionKit's, so one checkpoint loads in either. Unlike DiffusionKit the
modulation is computed in the forward pass: nothing is cached or emptied, and one batch may mix timesteps. SD3-Medium,
SD3.5 (``use_qk_norm``, and in its medium size ``dual_attention_layers``: blocks whose image tokens also attend to each
other alone, as MMDiT-X) and the embedded ``mmdit-shapes`` differ in ``MMDiTConfig`` only. Single-stream blocks and
rotary positions (FLUX) are refused.

Checkpoints of Stability AI have biases of keys and GELU's approximation by tanh. DiffusionKit drops the one and takes
the exact GELU; ``key_bias`` and ``gelu`` say which it is. A bias that is the same for all keys would cancel in the
softmax, but here image and text have each its own.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ...errors import AdapterError
from ...layers.attention import SoftmaxAttention
from ...layers.fast_cpu import gelu, gelu_tanh
from .config import MMDiTConfig

GELUS = {"exact": gelu, "tanh": gelu_tanh}


def layer_norm(x: mx.array, eps: float) -> mx.array:
    return mx.fast.layer_norm(x, None, None, eps)


def modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """adaLN: ``x (1 + scale) + shift``; x [B,N,C], shift and scale [B,1,C]."""
    return x * (1.0 + scale) + shift


def patch_tokens(x: mx.array, patch: int, height: int, width: int) -> mx.array:
    """Tokens [B,N,p*p*C] back to a latent image [B,H,W,C] (DiffusionKit's ``unpatchify``)."""
    b, h, w = x.shape[0], height // patch, width // patch
    return x.reshape(b, h, w, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, -1)


class LatentImageAdapter(nn.Module):
    """Patchify by a strided convolution: latent [B,H,W,C] to [B,H/p,W/p,hidden]."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.vae_latent_dim, config.hidden_size, config.patch_size, config.patch_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(x)


class LatentImagePositionalEmbedding(nn.Module):
    """Learned positions, cropped at the centre to the latent's size."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.pos_embed = nn.Embedding(config.max_latent_resolution**2, config.hidden_size)
        self._side, self._patch = config.max_latent_resolution, config.patch_size

    def __call__(self, height: int, width: int) -> mx.array:
        h, w = height // self._patch, width // self._patch
        if max(h, w) > self._side:
            raise AdapterError(f"latent of {h}x{w} patches exceeds the {self._side}x{self._side} position table")
        y, x = (self._side - h) // 2, (self._side - w) // 2
        table = self.pos_embed.weight.reshape(1, self._side, self._side, -1)
        return table[:, y : y + h, x : x + w]


class PooledTextEmbeddingAdapter(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        d = config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(config.pooled_text_embed_dim, d), nn.SiLU(), nn.Linear(d, d))

    def __call__(self, y: mx.array) -> mx.array:
        return self.mlp(y)


class TimestepAdapter(nn.Module):
    """Sinusoidal features of t = 1000 sigma (cosines first), then an MLP."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        d = config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(config.frequency_embed_dim, d), nn.SiLU(), nn.Linear(d, d))
        self._half, self._max_period = config.frequency_embed_dim // 2, config.max_period

    def __call__(self, t: mx.array) -> mx.array:
        falling = -mx.log(mx.array(float(self._max_period))) * mx.arange(self._half, dtype=mx.float32)
        angles = (
            t[:, None].astype(mx.float32) * mx.exp(falling / self._half)[None]
        )  # to the last digit as DiffusionKit has it
        features = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)
        return self.mlp(features)


class Attention(nn.Module):
    """The projections of one stream; attention itself happens in the block."""

    def __init__(self, dims: int, output: bool = True, key_bias: bool = False):
        super().__init__()
        self.q_proj = nn.Linear(dims, dims)
        self.k_proj = nn.Linear(dims, dims, bias=key_bias)
        self.v_proj = nn.Linear(dims, dims)
        if output:
            self.o_proj = nn.Linear(dims, dims)


class FFN(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        dims = config.hidden_size
        self.fc1 = nn.Linear(dims, dims * config.mlp_ratio)
        self.fc2 = nn.Linear(dims * config.mlp_ratio, dims)
        self._gelu = GELUS[config.gelu]

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self._gelu(self.fc1(x)))


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6)


Heads = tuple[mx.array, mx.array, mx.array]  # queries, keys and values, each [B,heads,N,C/heads]


class TransformerBlock(nn.Module):
    """One stream of a double-stream block. The last block's text stream only feeds keys and values: ``kv_only``.
    An image stream may have a second attention to itself: ``dual``.
    """

    def __init__(self, config: MMDiTConfig, kv_only: bool = False, dual: bool = False):
        super().__init__()
        d, head = config.hidden_size, config.hidden_size // config.num_heads
        self.attn = Attention(d, output=not kv_only, key_bias=config.key_bias)
        if dual:
            self.attn2 = Attention(d, key_bias=config.key_bias)
        if not kv_only:
            self.mlp = FFN(config)
        self._chunks = 2 if kv_only else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, self._chunks * d))
        if config.use_qk_norm:
            self.qk_norm = QKNorm(head)
            if dual:
                self.qk_norm2 = QKNorm(head)
        self._eps, self._heads = config.layer_norm_eps, config.num_heads

    def modulation(self, c: mx.array) -> list[mx.array]:
        """c [B,C] to shift1, scale1 (, gate1, shift2, scale2, gate2 (, shift3, scale3, gate3)), each [B,1,C]; 1 is of
        the attention, 2 of the MLP, 3 of the second attention.
        """
        return list(mx.split(self.adaLN_modulation(c)[:, None], self._chunks, axis=-1))

    def qkv(self, x: mx.array, modulation: list[mx.array]) -> Heads:
        """What the joint attention reads of this stream's x [B,N,C]."""
        return self._projected(x, modulation[:2], self.attn, self.get("qk_norm"))

    def qkv2(self, x: mx.array, modulation: list[mx.array]) -> Heads:
        """What the second attention reads."""
        return self._projected(x, modulation[6:8], self.attn2, self.get("qk_norm2"))

    def _projected(self, x: mx.array, modulation: list[mx.array], attn: Attention, norm: QKNorm | None) -> Heads:
        x = modulate(layer_norm(x, self._eps), *modulation)
        b, n, d = x.shape
        q, k, v = (
            proj(x).reshape(b, n, self._heads, d // self._heads).transpose(0, 2, 1, 3)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        return (q, k, v) if norm is None else (norm.q_norm(q), norm.k_norm(k), v)

    def finish(
        self, x: mx.array, attended: mx.array, modulation: list[mx.array], alone: mx.array | None = None
    ) -> mx.array:
        """Residual, output projections and MLP; x, what was attended to, and by the second attention, [B,N,C]."""
        gate1, shift2, scale2, gate2 = modulation[2:6]
        x = x + gate1 * self.attn.o_proj(attended)
        if alone is not None:
            x = x + modulation[8] * self.attn2.o_proj(alone)
        return x + gate2 * self.mlp(modulate(layer_norm(x, self._eps), shift2, scale2))


def joined_heads(x: mx.array) -> mx.array:
    """[B,heads,N,C/heads] to [B,N,C]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


class MultiModalTransformerBlock(nn.Module):
    """Double-stream block: separate weights, one attention over image and text tokens, and perhaps one over the image
    tokens alone.
    """

    def __init__(self, config: MMDiTConfig, last: bool = False, dual: bool = False):
        super().__init__()
        self.image_transformer_block = TransformerBlock(config, dual=dual)
        self.text_transformer_block = TransformerBlock(config, kv_only=last)
        self.sdpa = SoftmaxAttention()
        if dual:
            self.sdpa2 = SoftmaxAttention()
        self._last = last

    def __call__(self, image: mx.array, text: mx.array, c: mx.array) -> tuple[mx.array, mx.array | None]:
        """image [B,N,C], text [B,T,C], conditioning c [B,C]; returns the same shapes, text None from the last block."""
        stream_i, stream_t = self.image_transformer_block, self.text_transformer_block
        mod_i, mod_t = stream_i.modulation(c), stream_t.modulation(c)
        pairs = zip(stream_i.qkv(image, mod_i), stream_t.qkv(text, mod_t), strict=True)
        q, k, v = (mx.concatenate(list(pair), axis=2) for pair in pairs)
        attended = joined_heads(self.sdpa(q, k, v))
        alone: mx.array | None = None
        if "sdpa2" in self:
            q, k, v = stream_i.qkv2(image, mod_i)
            alone = joined_heads(self.sdpa2(q, k, v))
        n = image.shape[1]
        image = stream_i.finish(image, attended[:, :n], mod_i, alone)
        return image, None if self._last else stream_t.finish(text, attended[:, n:], mod_t)


class FinalLayer(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        d = config.hidden_size
        self.linear = nn.Linear(d, config.patch_size**2 * config.vae_latent_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))
        self._eps = config.layer_norm_eps

    def __call__(self, x: mx.array, c: mx.array) -> mx.array:
        shift, scale = mx.split(self.adaLN_modulation(c)[:, None], 2, axis=-1)
        return self.linear(modulate(layer_norm(x, self._eps), shift, scale))


class MMDiT(nn.Module):
    """The whole transformer: predicts the velocity ``noise - image`` of rectified flow."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self._config = config
        self.x_embedder = LatentImageAdapter(config)
        self.x_pos_embedder = LatentImagePositionalEmbedding(config)
        self.y_embedder = PooledTextEmbeddingAdapter(config)
        self.t_embedder = TimestepAdapter(config)
        self.context_embedder = nn.Linear(config.token_level_text_embed_dim, config.hidden_size)
        last = config.depth_multimodal - 1
        self.multimodal_transformer_blocks = [
            MultiModalTransformerBlock(config, i == last, i in config.dual_attention_layers)
            for i in range(config.depth_multimodal)
        ]
        self.final_layer = FinalLayer(config)

    @property
    def config(self) -> MMDiTConfig:
        return self._config

    def embed(
        self, latent: mx.array, tokens: mx.array, pooled: mx.array, t: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """latent [B,H,W,C], tokens [B,T,E], pooled [B,P], t [B] = 1000 sigma to (image [B,N,D], text [B,T,D], c
        [B,D]).
        """
        b, height, width, _ = latent.shape
        image = (self.x_embedder(latent) + self.x_pos_embedder(height, width)).reshape(b, -1, self._config.hidden_size)
        return image, self.context_embedder(tokens), self.y_embedder(pooled) + self.t_embedder(t)

    def head(self, image: mx.array, c: mx.array, height: int, width: int) -> mx.array:
        """Image tokens [B,N,D] to a velocity [B,H,W,C]."""
        return patch_tokens(self.final_layer(image, c), self._config.patch_size, height, width)

    def __call__(self, latent: mx.array, tokens: mx.array, pooled: mx.array, t: mx.array) -> mx.array:
        """See ``embed`` for the arguments; returns the velocity [B,H,W,C]."""
        image, text, c = self.embed(latent, tokens, pooled, t)
        for block in self.multimodal_transformer_blocks:
            image, after = block(image, text, c)
            text = text if after is None else after
        return self.head(image, c, latent.shape[1], latent.shape[2])
