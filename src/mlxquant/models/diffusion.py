"""Diffusion transformers as adapters: a chain from a noisy latent and its conditioning to a velocity, and a sampler
around it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..errors import AdapterError
from ..numerics.arrays import Array
from ..sampling.conditioning import Conditioning
from ..sampling.prompts import Prompt
from ..sampling.sampler import SamplerStep, sample, seeded_noise
from ..sampling.schedules import Sigmas, flow_sigmas
from .adapter import Adapter, State


class DiffusionAdapter(Adapter):
    """A model that draws pictures. Its chain leads from {latent [B,H,W,C], tokens [B,T,E], pooled [B,P], t [B]} to
    {velocity [B,H,W,C]}.

    Attributes:
        shift: Of the noise schedule.
        steps: Sampler steps where nobody says.
        cfg: Guidance where nobody says.
        latent_shape: H, W, C.
    """

    shift: float = 1.0
    steps: int = 28
    cfg: float = 1.0
    latent_shape: tuple[int, int, int]

    @property
    def size(self) -> int:
        """Pixels of a picture's side; here for models whose latents are pixels."""
        return self.latent_shape[0]

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning.

        Args:
            prompts: B of them; the empty prompt is the unconditional one.

        Returns:
            Tokens float32 [B,T,E] and pooled float32 [B,P].
        """

    def prepare(self, prompts: Iterable[Prompt]) -> None:
        """Encode prompts, and the empty one, all at once: an adapter that remembers them reads heavy text encoders only
        here.

        Args:
            prompts: All that will be drawn; equal texts are encoded once.
        """
        self.encode([*dict.fromkeys(prompt.text for prompt in prompts), ""])

    @abstractmethod
    def decode(self, latent: mx.array) -> npt.NDArray[np.float32]:
        """Latents to pictures.

        Args:
            latent: [B,H,W,C].

        Returns:
            float32 [B,height,width,3] in [0,1].
        """

    def resize(self, size: int) -> None:
        """Draw pictures of another size from now on.

        Args:
            size: Pixels of a side.

        Raises:
            AdapterError: The model cannot.
        """
        raise AdapterError(f"{self.name} draws pictures of one size only; leave --size out")

    @abstractmethod
    def prompts(self, purpose: str, count: int, seed: int = 0) -> list[Prompt]:
        """The model's own prompts.

        Args:
            purpose: "calibration" or "evaluation"; the two are disjoint.
            count: How many.
            seed: Shifts the seeds of their noise.

        Raises:
            AdapterError: Another purpose, or more than there are.
        """

    def attributes(self, images: Array, prompts: Sequence[str]) -> Sequence[Mapping[str, bool]] | None:
        """Whether pictures show what their prompts ask for.

        Args:
            images: [B,height,width,3] in [0,1].
            prompts: B texts.

        Returns:
            The marks of each picture, by attribute; None where the model cannot tell.
        """
        return None

    def sigmas(self, steps: int) -> Sigmas:
        """The ``steps + 1`` noise levels of a sampler, from 1 down to 0; see ``flow_sigmas``."""
        return flow_sigmas(steps, self.shift)

    def state(self, latent: mx.array, tokens: mx.array, pooled: mx.array, sigma: float | Array) -> State:
        """The chain's input.

        Args:
            latent: [B,H,W,C].
            tokens: [B,T,E].
            pooled: [B,P].
            sigma: The noise level in [0,1], or one for each sample [B]; the model is told t = 1000 sigma.
        """
        t = mx.broadcast_to(mx.array(np.float32(1000) * np.asarray(sigma, np.float32)), (latent.shape[0],))
        return {"latent": latent, "tokens": tokens, "pooled": pooled, "t": t}

    def velocity(self, latent: mx.array, tokens: mx.array, pooled: mx.array, sigma: float | Array) -> mx.array:
        """The model's prediction of ``noise - image`` [B,H,W,C], evaluated; arguments as for ``state``."""
        return self.run(self.state(latent, tokens, pooled, sigma), sigma)["velocity"]

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        cfg: float | None = None,
        callback: Callable[[SamplerStep], None] | None = None,
    ) -> mx.array:
        """Sample latents.

        Args:
            prompts: B texts, at least one.
            seeds: Of the noise, one a prompt.
            steps: Of the sampler; None takes the model's default.
            cfg: Guidance; None takes the model's default.
            callback: Shown each step, see ``sampling.sampler.sample``.

        Returns:
            Latents [B,H,W,C].

        Raises:
            AdapterError: Not one seed a prompt, or none.
        """
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
