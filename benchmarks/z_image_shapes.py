"""A small Z-Image of mflux that draws the captioned shapes of ``mmdit-shapes``: its classes, and what stands around it.

Random weights say little about what rounding does to pictures, and the weights of ``mmdit-shapes`` fit no transformer
of mflux: all of them normalise queries and keys, and Z-Image modulates by scales and gates alone. So
``train_z_image_shapes.py`` trains one in Z-Image's own shape. Widths are multiples of 64, mflux's groups, so two parts
are made anew, by mflux's classes: the MLPs (2/3 of 4 times 128 is none) and the embedding of the time, 1024 wide.

Its latents have 16 channels, as Z-Image's: red, green, blue and their mean of 2 x 2 pixels. A caption's words are
embedded one by one, in the place of Qwen3's hidden states.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.z_image.model.z_image_transformer.feed_forward import FeedForward
from mflux.models.z_image.model.z_image_transformer.timestep_embedder import TimestepEmbedder
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer

from mlxquant.files import schema
from mlxquant.files.checked import read_tensors
from mlxquant.files.parameters import load_parameters
from mlxquant.models.shapes.adapter import to_latent
from mlxquant.models.shapes.captions import LENGTH, WORDS, tokenize
from mlxquant.models.shapes.scenes import SIDE

KIND = "z-image-shapes"
FACTS = schema.table_of(schema.anything)
WIDTH, HIDDEN, TEXT, BLOCKS = 128, 384, 64, 3
CHANNELS, LATENT = 16, SIDE // 2
CAPTION = 32  # tokens; mflux pads to a multiple of this


def transformer() -> nn.Module:
    """mflux's transformer, small, its weights by MLX's global seed; float32, for CPUs are slow at bfloat16."""
    ModelConfig.precision = mx.float32
    made = ZImageTransformer(
        in_channels=CHANNELS,
        dim=WIDTH,
        n_layers=BLOCKS,
        n_refiner_layers=1,
        n_heads=4,
        cap_feat_dim=TEXT,
        axes_dims=[8, 12, 12],
        axes_lens=[64, 16, 16],
    )
    made.t_embedder = TimestepEmbedder(out_size=WIDTH, mid_size=WIDTH)
    for block in (*made.noise_refiner, *made.context_refiner, *made.layers):
        block.feed_forward = FeedForward(WIDTH, HIDDEN)
    return made


class ZImageShapes(nn.Module):
    """The transformer, and the words that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = transformer()
        self.words = nn.Embedding(len(WORDS) + 1, TEXT)

    def read(self, caption: str) -> mx.array:
        """A caption's words [T,64]; of the empty one a word of its own."""
        ids = [word for word in tokenize(caption) if word] or [0]
        return self.words(mx.array(ids))

    def velocities(self, latents: mx.array, ids: mx.array, sigma: mx.array) -> mx.array:
        """What the transformer says of a batch, which mflux's own call has no place for; the order of operations is
        its own, and so is what comes out.

        Args:
            latents: [B,16,16,16], channels last.
            ids: [B,12], as ``tokenize`` has them.
            sigma: [B], noise levels.

        Returns:
            Noise less picture, [B,16,16,16], channels last.
        """
        model, key = self.transformer, "2-1"
        time = model.t_embedder((1 - sigma) * model.t_scale)
        batch, half = latents.shape[0], LATENT // 2
        patches = latents.reshape(batch, half, 2, half, 2, CHANNELS).transpose(0, 1, 3, 2, 4, 5)
        image = model.all_x_embedder[key](patches.reshape(batch, half * half, 4 * CHANNELS))
        y, x = mx.divmod(mx.arange(half * half), half)
        angles = model.rope_embedder(mx.stack([mx.full(x.shape, CAPTION + 1), y, x], axis=1))
        for block in model.noise_refiner:
            image = block(x=image, attn_mask=None, freqs_cis=angles, t_emb=time)
        text = model.cap_embedder[1](model.cap_embedder[0](self.words(ids)))
        padding = mx.broadcast_to(model.cap_pad_token, (batch, CAPTION - LENGTH, WIDTH))
        is_word = (ids > 0) | ((mx.arange(LENGTH) == 0) & (ids.max(axis=1, keepdims=True) == 0))
        text = mx.concatenate([mx.where(is_word[..., None], text, model.cap_pad_token), padding], axis=1)
        zeros = mx.zeros((CAPTION,), mx.int32)
        turns = model.rope_embedder(mx.stack([mx.arange(1, CAPTION + 1), zeros, zeros], axis=1))
        for block in model.context_refiner:
            text = block(x=text, attn_mask=None, freqs_cis=turns)
        both, angles = mx.concatenate([image, text], axis=1), mx.concatenate([angles, turns])
        for block in model.layers:
            both = block(x=both, attn_mask=None, freqs_cis=angles, t_emb=time)
        patches = model.all_final_layer[key](both, time)[:, : half * half]
        patches = patches.reshape(batch, half, half, 2, 2, CHANNELS).transpose(0, 1, 3, 2, 4, 5)
        return -patches.reshape(batch, LATENT, LATENT, CHANNELS)


def load(weights: Path) -> ZImageShapes:
    """The model with trained weights, float32; raises ArtifactError where the file is damaged or another's."""
    arrays, _ = read_tensors(weights, kind=KIND, schema=FACTS)
    model = ZImageShapes()
    load_parameters(model, {name: value.astype(mx.float32) for name, value in arrays.items()}, weights.name)
    mx.eval(model.parameters())
    return model


def encode(images: mx.array) -> mx.array:
    """Pictures [B,32,32,3] in [0,1] to latents [B,16,16,16], channels last, in [-1,1]."""
    return to_latent(mx.concatenate([images, images.mean(axis=-1, keepdims=True)], axis=-1))


def pixels(latents: mx.array) -> npt.NDArray[np.float32]:
    """Latents to pictures [B,32,32,3], in [0,1] but for what sticks out."""
    parts = latents.reshape(-1, LATENT, LATENT, 2, 2, CHANNELS // 4).transpose(0, 1, 3, 2, 4, 5)
    return np.array(parts.reshape(-1, SIDE, SIDE, CHANNELS // 4)[..., :3] * 0.5 + 0.5, np.float32)
