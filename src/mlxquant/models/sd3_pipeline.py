"""DiffusionKit's own pipeline around a model of ours, quantized or not: its ``generate_image``, its sampler, its image-to-image."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .diffusionkit import host
from .sd3_checkpoint import vae_encoder
from .sd3_files import CHECKPOINT, HUB, Files
from .sd3_medium import SD3Medium


def pipeline(adapter: SD3Medium) -> Any:
    """A ``DiffusionPipeline`` that draws with the adapter's transformer, text encoders and VAE.

    It differs from DiffusionKit's own where that fails: any number of prompts, any guidance from 0 on, ``verbose`` prints nothing,
    and the transformer's modulation layers are left as they are.
    """
    kit = host()
    base: Any = kit.package.DiffusionPipeline

    class Pipeline(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.float16_dtype = self.dtype = mx.float16
            self.activation_dtype = mx.float32
            self.use_t5 = self.use_clip_g = True
            self.low_memory_mode = False
            self.model, self.model_version, self.mmdit_ckpt = kit.model_io._DEFAULT_MODEL, HUB, HUB
            self.sampler = kit.package.ModelSamplingDiscreteFlow(shift=adapter.shift)
            self.latent_format = kit.package.SD3LatentFormat()
            self.mmdit = adapter.module

        @property
        def decoder(self) -> Any:
            return adapter.components.decoder

        @property
        def encoder(self) -> Any:
            return vae_encoder(Files(adapter.place).path(CHECKPOINT))

        def check_and_load_models(self) -> None:
            """Nothing to do: what is needed is read when it is needed."""

        def set_up_t5(self) -> None:
            """Nothing to do: ``encode_text`` reads T5 itself."""

        def load_mmdit(self, only_modulation_dict: bool = False) -> list[tuple[str, mx.array]]:
            """What DiffusionKit puts back after sampling: nothing, for nothing was taken away."""
            return []

        def encode_text(self, text: str, cfg_weight: float = 7.5, negative_text: str = "") -> tuple[mx.array, mx.array]:
            """Token embeddings [B,T,E] and pooled embeddings [B,P]: the prompt and, with guidance, the negative one."""
            found = adapter.encode([text, negative_text] if cfg_weight > 0 else [text])
            return found.tokens, found.pooled

        def generate_image(self, text: str, *args: Any, verbose: bool = False, **kwargs: Any) -> Any:
            """As DiffusionKit's; returns a PIL image and its log."""
            return super().generate_image(text, *args, verbose=False, **kwargs)

    return Pipeline()
