"""Diffusion models as adapters: a chain from a noisy latent and its conditioning to a velocity, and a sampler around
it.
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
from ..sampling.guidance import CLASSIFIER_FREE, Guidance, guided, sides
from ..sampling.picture_size import PictureSize, picture_size, told
from ..sampling.prompts import Prompt
from ..sampling.sampler import SamplerStep, sample, seeded_noise
from .adapter import Adapter
from .scheduled import ScheduledAdapter
from .stages import State


class DiffusionAdapter(ScheduledAdapter):
    """A model that draws pictures. Its chain leads from what ``state`` gives, which is {latent [B,H,W,C], t [B]} and
    what the model is conditioned on, to one array {velocity [B,H,W,C]}, which is whatever it predicts.

    Attributes:
        cfg: The weight of guidance where nobody says.
        guidance: What kind of guidance it takes: "classifier-free", "embedded" (its conditioning then has a row
            ``guidance`` [B]) or "none"; see ``sampling.guidance``.
        alone: Whether rows cannot share a forward pass. Then each runs by itself, and no state has two; ``rows`` has
            to be 1.
        latent_shape: H, W, C, as the sampler has them.
    """

    cfg: float = 1.0
    guidance: str = CLASSIFIER_FREE
    alone: bool = False
    latent_shape: tuple[int, int, int]

    @property
    def size(self) -> PictureSize:
        """Width and height of a picture in pixels; here for models whose latents are pixels."""
        return self.latent_shape[1], self.latent_shape[0]

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning.

        Args:
            prompts: B of them.

        Returns:
            All that the model reads of them, B rows under names of the model's own, such as tokens [B,T,E], pooled
            [B,P] and mask [B,T].
        """

    def unconditional(self, count: int, negative: str | None = None) -> Conditioning:
        """The other side of classifier-free guidance. Here it is the empty prompt; a model that has zeros or learned
        tokens in its place says so.

        Args:
            count: How many rows.
            negative: A negative prompt, which takes the place of the empty one; None for none.

        Returns:
            ``count`` equal rows, under the names that ``encode`` uses.
        """
        return self.encode([negative or ""] * count)

    def both_sides(self, prompts: Sequence[str], guidance: Guidance) -> tuple[Conditioning, Conditioning]:
        """What guidance reads of prompts, encoded at once and each text once.

        Args:
            prompts: B of them.
            guidance: How the model is guided.

        Returns:
            The conditioning of the prompts and that of the other side, B rows each; where guidance asks for one side
            only, twice that.
        """
        asked, found = sides(guidance), list[Conditioning]()
        wanted = [list(prompts)] if True in asked else []
        if False in asked:
            if type(self).unconditional is DiffusionAdapter.unconditional:  # a text like others
                wanted.append([guidance.negative or ""] * len(prompts))
            else:
                found.append(self.unconditional(len(prompts), guidance.negative))
        texts = list(dict.fromkeys(text for side in wanted for text in side))
        if texts:
            read = self.encode(texts)
            found[:0] = [read.take(mx.array([texts.index(text) for text in side])) for side in wanted]
        return found[0], found[-1]

    def guiding(self, cfg: float | None = None, negative: str | None = None) -> Guidance:
        """How this model is guided.

        Args:
            cfg: The weight; None for the model's own.
            negative: The negative prompt; None or blank for none.

        Raises:
            AdapterError: The model cannot be guided so, or its rows cannot be joined and ``rows`` is not 1.
        """
        if self.alone and self.rows != 1:
            raise AdapterError(
                f"{self.name}: rows that cannot share a forward pass are differentiated one by one, too, found rows ="
                f" {self.rows}; set it to 1"
            )
        told = negative if negative is not None and negative.strip() else None
        return Guidance(self.cfg if cfg is None else cfg, told, self.guidance, self.alone)

    def prepare(self, prompts: Iterable[Prompt], negative: str | None = None) -> None:
        """Encode prompts, and that of the other side, all at once: an adapter that remembers them reads heavy text
        encoders only here.

        Args:
            prompts: All that will be drawn; equal texts are encoded once.
            negative: The negative prompt; None for the empty one.
        """
        self.encode(list(dict.fromkeys([*(prompt.text for prompt in prompts), negative or ""])))

    @abstractmethod
    def decode(self, latent: mx.array) -> npt.NDArray[np.float32]:
        """Latents to pictures.

        Args:
            latent: [B,H,W,C].

        Returns:
            float32 [B,height,width,3] in [0,1].
        """

    def latents(self, pictures: npt.NDArray[np.float32]) -> mx.array:
        """Pictures to latents, the inverse of ``decode``, for models that can draw from a picture.

        Args:
            pictures: [B,height,width,3] in [0,1].

        Returns:
            [B,H,W,C].

        Raises:
            AdapterError: The model cannot, or these have another size.
        """
        raise AdapterError(f"{self.name} draws from noise alone: it has nothing that makes latents of a picture")

    def resize(self, size: int | PictureSize) -> None:
        """Draw pictures of another size from now on.

        Args:
            size: Width and height in pixels, or one number for a square.

        Raises:
            AdapterError: The model cannot, or it is no size.
        """
        if (wanted := picture_size(size)) != self.size:
            self.latent_shape = self.latent_of(*wanted)

    def latent_of(self, width: int, height: int) -> tuple[int, int, int]:
        """The shape of the latents of another size; a model that draws more than one says which.

        Args:
            width: Of the picture, in pixels.
            height: Of the picture, in pixels.

        Returns:
            H, W, C.

        Raises:
            AdapterError: The model draws no such pictures.
        """
        raise AdapterError(
            f"{self.name} draws pictures of one size only, {told(self.size)} pixels, found"
            f" {told((width, height))}; leave --size out"
        )

    def pack(self, latent: mx.array) -> mx.array:
        """What the chain reads of latents, for models that read tokens; here the latents themselves.

        Args:
            latent: [B,H,W,C], as the sampler has them.

        Returns:
            Any array of B rows, such as [B,N,D].
        """
        return latent

    def unpack(self, predicted: mx.array, shape: tuple[int, int, int]) -> mx.array:
        """What the chain predicts, as the sampler has it: the inverse of ``pack``.

        Args:
            predicted: B rows, such as [B,N,D].
            shape: H, W, C of the latents.

        Returns:
            [B,H,W,C].
        """
        return predicted

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

    def judged(self, signs: State) -> State:
        """See ``Adapter.judged``: without a learned variance."""
        if not self.parameterization.learned_variance:
            return signs

        def counted(predicted: mx.array) -> list[mx.array]:
            return [self.parameterization.prediction(self.unpack(predicted, self.latent_shape))]

        kept = {key: mx.vjp(counted, [value], [mx.ones_like(counted(value)[0])])[1][0] for key, value in signs.items()}
        return {key: value * kept[key] for key, value in signs.items()}

    def state(self, latent: mx.array, conditioning: Conditioning, sigma: float | Array) -> State:
        """The chain's input.

        Args:
            latent: [B,H,W,C].
            conditioning: What ``encode`` or ``unconditional`` gave, B rows, and with embedded guidance its weight.
            sigma: The noise level in [0,1], or one for each sample [B]; what the model is told of it is the
                scheduler's ``time``, for flows t = 1000 sigma.

        Returns:
            The latent as ``pack`` gives it, the arrays of the conditioning under their names, and t [B] float32.
        """
        read = {**conditioning}
        if taken := [name for name in ("latent", "t") if name in read]:
            raise AdapterError(f"{self.name}: a conditioning cannot have arrays named {taken}; choose other names")
        t = mx.broadcast_to(mx.array(self.scheduler.time(sigma)), (latent.shape[0],))
        return {"latent": self.pack(latent), **read, "t": t}

    def velocity(self, latent: mx.array, conditioning: Conditioning, sigma: float | Array) -> mx.array:
        """The model's prediction [B,H,W,C], of a flow ``noise - image``, without a learned variance; evaluated.
        Arguments as for ``state``.
        """
        (predicted,) = self.run(self.state(latent, conditioning, sigma), sigma).values()
        _, height, width, channels = latent.shape
        return self.parameterization.prediction(self.unpack(predicted, (height, width, channels)))

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        cfg: float | None = None,
        callback: Callable[[SamplerStep], None] | None = None,
        negative: str | None = None,
        image: mx.array | None = None,
        strength: float = 0.6,
    ) -> mx.array:
        """Sample latents.

        Args:
            prompts: B texts, at least one.
            seeds: Of the noise, one a prompt.
            steps: Of the sampler; None takes the model's default.
            cfg: The weight of guidance; None takes the model's default.
            callback: Shown each step, see ``sampling.sampler.sample``.
            negative: What guidance leads away from; None for the model's own, mostly the empty prompt.
            image: Latents [B,H,W,C] to begin with, as ``latents`` gives them; None for noise alone.
            strength: Of the change of an image, in (0,1]: what share of the steps is taken, the last ones.

        Returns:
            Latents [B,H,W,C].

        Raises:
            AdapterError: Not one seed a prompt, or none; guidance that the model does not have; an image of other
                latents, or an impossible strength.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise AdapterError(
                f"expected one seed for each of at least one prompt, found {len(prompts)} prompts and {len(seeds)}"
                " seeds"
            )
        guidance = self.guiding(cfg, negative)
        noise = seeded_noise(seeds, self.latent_shape)
        text = self.encode(prompts)
        other = self.unconditional(len(prompts), guidance.negative) if False in sides(guidance) else text
        walk = self.walk(self.steps if steps is None else steps)
        if image is not None:
            if image.shape != noise.shape or not 0 < strength <= 1:
                raise AdapterError(
                    f"{self.name}: an image of latents {list(image.shape)} at strength {strength:g}; expected"
                    f" {list(noise.shape)}, and a strength above 0 and at most 1"
                )
            walk = walk.since(int(len(walk) - len(walk) * strength))

        def velocity(latent: mx.array, sigma: float) -> mx.array:
            return guided(self.velocity, latent, sigma, text, other, guidance)

        return sample(velocity, noise, walk, self.parameterization, callback, seeds, image)


def diffusion(adapter: Adapter) -> DiffusionAdapter:
    """The adapter, as one that draws; raises AdapterError where the model writes text."""
    if not isinstance(adapter, DiffusionAdapter):
        raise AdapterError(
            f"{adapter.name} draws no pictures; this needs a model that does, such as mmdit-shapes ('mlxquant"
            " perplexity' measures text)"
        )
    return adapter
