"""Diffusion transformers as adapters: a chain from a noisy latent and its conditioning to a velocity, and a sampler
around it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..errors import AdapterError
from ..sampling.conditioning import Conditioning
from ..sampling.prompts import Prompt
from ..sampling.sampler import SamplerStep, sample, seeded_noise
from ..sampling.schedules import Sigmas, flow_sigmas
from .adapter import Adapter, State


class DiffusionAdapter(Adapter):
    """A model that draws pictures. Its chain leads from {latent, tokens, pooled, t} to {velocity}."""

    shift: float = 1.0  # of the noise schedule
    steps: int = 28  # default number of sampler steps
    cfg: float = 1.0  # default guidance
    latent_shape: tuple[int, int, int]  # H, W, C

    @property
    def size(self) -> int:
        """Pixels of a picture's side; here for models whose latents are pixels."""
        return self.latent_shape[0]

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning of prompts; the empty prompt is the unconditional one."""

    def prepare(self, prompts: Iterable[Prompt]) -> None:
        """Encode prompts, and the empty one, all at once: an adapter that remembers them reads heavy text encoders only
        here.
        """
        self.encode([*dict.fromkeys(prompt.text for prompt in prompts), ""])

    @abstractmethod
    def decode(self, latent: mx.array) -> npt.NDArray[np.float32]:
        """Latents [B,H,W,C] to pictures [B,height,width,3] in [0,1]."""

    def resize(self, size: int) -> None:
        """Draw pictures of this many pixels a side from now on; AdapterError where the model cannot."""
        raise AdapterError(f"{self.name} draws pictures of one size only; leave --size out")

    @abstractmethod
    def prompts(self, purpose: str, count: int, seed: int = 0) -> list[Prompt]:
        """The model's own prompts for "calibration" or "evaluation", disjoint; ``seed`` shifts the noise seeds."""

    def attributes(self, images: npt.NDArray[Any], prompts: Sequence[str]) -> dict[str, float] | None:
        """Share of prompt attributes that the pictures obey, where the model can tell; ``mean`` is over all of them."""
        return None

    def sigmas(self, steps: int) -> Sigmas:
        return flow_sigmas(steps, self.shift)

    def state(self, latent: mx.array, tokens: mx.array, pooled: mx.array, sigma: float | npt.NDArray[Any]) -> State:
        """The chain's input; sigma is one number, or one for each sample."""
        t = mx.broadcast_to(mx.array(np.float32(1000) * np.asarray(sigma, np.float32)), (latent.shape[0],))
        return {"latent": latent, "tokens": tokens, "pooled": pooled, "t": t}

    def velocity(
        self, latent: mx.array, tokens: mx.array, pooled: mx.array, sigma: float | npt.NDArray[Any]
    ) -> mx.array:
        """The model's prediction of ``noise - image`` [B,H,W,C]."""
        return self.run(self.state(latent, tokens, pooled, sigma), sigma)["velocity"]

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        cfg: float | None = None,
        callback: Callable[[SamplerStep], None] | None = None,
    ) -> mx.array:
        """Sample latents [B,H,W,C] for prompts, one seed each; see ``sampler.sample``."""
        if len(prompts) != len(seeds) or not prompts:
            raise AdapterError(
                f"expected one seed for each of at least one prompt, found {len(prompts)} prompts and {len(seeds)}"
                " seeds"
            )
        noise = seeded_noise(seeds, self.latent_shape)
        text, empty = self.encode(prompts), self.encode([""] * len(prompts))
        sigmas = self.sigmas(self.steps if steps is None else steps)
        return sample(self.velocity, noise, sigmas, text, empty, self.cfg if cfg is None else cfg, callback)


def diffusion(adapter: Adapter) -> DiffusionAdapter:
    """The adapter, as one that draws; raises AdapterError where the model writes text."""
    if not isinstance(adapter, DiffusionAdapter):
        raise AdapterError(
            f"{adapter.name} draws no pictures; this needs a model that does, such as mmdit-shapes ('mlxquant"
            " perplexity' measures text)"
        )
    return adapter
