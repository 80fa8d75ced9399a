"""DiffusionKit's own pipeline around a model of ours, quantized or not: its ``generate_image``, its sampler, its
image-to-image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from .checkpoint import vae_encoder
from .files import CHECKPOINT, HUB, PIXELS, Files
from .package import host


class Drawn(Protocol):
    """What the pipeline needs of a model: the transformer, what stands around it, and where its files are."""

    module: Any
    components: Any
    shift: float
    latent_shape: tuple[int, int, int]

    @property
    def place(self) -> str: ...

    def encode(self, prompts: Sequence[str]) -> Any: ...

    def check_size(self, size: int) -> None: ...


def pipeline(adapter: Drawn) -> Any:
    """A ``DiffusionPipeline`` that draws with the adapter's transformer, text encoders and VAE.

    It differs from DiffusionKit's own where that fails: any number of prompts, any guidance from 0 on, ``verbose``
    prints nothing, the transformer's modulation layers are left as they are, and NumPy's random numbers, too. Pictures
    have the adapter's size unless ``latent_size`` says otherwise.
    """
    return _pipeline_class()(adapter)


@cache
def _pipeline_class() -> Any:
    kit = host()
    base: Any = kit.package.DiffusionPipeline

    class Pipeline(base):  # type: ignore[misc]
        def __init__(self, adapter: Drawn) -> None:
            self.adapter = adapter
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
            return self.adapter.components.decoder

        @property
        def encoder(self) -> Any:
            return vae_encoder(Files(self.adapter.place).path(CHECKPOINT))

        def check_and_load_models(self) -> None:
            """Nothing to do, as for the next three: what is needed is read when it is needed, and released."""

        def ensure_models_are_loaded(self) -> None:
            pass

        def set_up_t5(self) -> None:
            pass

        def unload_t5(self) -> None:
            pass

        def load_mmdit(self, only_modulation_dict: bool = False) -> list[tuple[str, mx.array]]:
            """What DiffusionKit puts back after sampling: nothing, for nothing was taken away."""
            return []

        def encode_text(self, text: str, cfg_weight: float = 7.5, negative_text: str = "") -> tuple[mx.array, mx.array]:
            """Token embeddings [B,T,E] and pooled embeddings [B,P]: the prompt and, with guidance, the negative one."""
            found = self.adapter.encode([text, negative_text] if cfg_weight > 0 else [text])
            return found["tokens"], found["pooled"]

        def generate_image(
            self,
            text: str,
            num_steps: int = 2,
            cfg_weight: float = 0.0,
            negative_text: str = "",
            latent_size: tuple[int, int] | None = None,
            seed: int | None = None,
            verbose: bool = False,
            image_path: str | None = None,
            denoise: float = 1.0,
        ) -> Any:
            """As DiffusionKit's; returns a PIL image and its log. ``latent_size`` is in latents of 8 pixels."""
            size = self.adapter.latent_shape[:2] if latent_size is None else latent_size
            for side in size:
                self.adapter.check_size(PIXELS * side)
            Files(self.adapter.place).path(CHECKPOINT)  # the VAE: missed now, not after the last step
            numbers = np.random.get_state()
            try:
                return super().generate_image(
                    text, num_steps, cfg_weight, negative_text, size, seed, False, image_path, denoise
                )
            finally:
                np.random.set_state(numbers)
                self.mmdit.clear_modulation_params_cache()

    return Pipeline
