"""The same prompts and seeds drawn by several models, batch by batch, each batch kept in a file: a killed run draws
only what is missing.

Pictures are kept in float32, for every figure is computed on what the model drew and not on 8-bit files. Batches are
those of every other loop that draws, so pictures are the same, bit for bit, as anywhere else. Of the sampler's
trajectory the reference's latents are kept, and of the others how far theirs are from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..files import checked
from ..files.kept_arrays import KeptArrays
from ..metrics.trajectory import trajectory_error
from ..numerics.arrays import Array
from ..progress import Progress
from ..sampling.batches import drawn_batches
from ..sampling.guidance import Guidance
from ..sampling.prompts import Prompt
from .contender import Contender

KIND = "drawing"


@dataclass(frozen=True)
class Drawings:
    """Pictures of ``prompts`` by ``reference`` and others, in ``folder``."""

    folder: Path
    reference: Contender
    prompts: tuple[Prompt, ...]
    steps: int
    guidance: Guidance

    @property
    def starts(self) -> range:
        """The first prompt of each batch; the batches are the reference's, for everyone."""
        return range(0, len(self.prompts), self.reference.model.adapter.batch)

    @cached_property
    def sigmas(self) -> Array:
        """[steps + 1], descending to 0."""
        return self.reference.model.diffusion.sigmas(self.steps)

    def draw(self, contenders: Sequence[Contender], progress: Progress) -> None:
        """Draw what is missing, model by model within a batch. Raises NumericsError when a picture is not finite,
        ArtifactError on a damaged or full disk.
        """
        missing = [
            (start, one)
            for start in self.starts
            for one in (self.reference, *contenders)
            if self._kept(one, start).load() is None
        ]
        for one in {one.folder: one for _, one in missing}.values():
            one.model.diffusion.prepare(self.prompts, self.guidance.negative)
        for start, one in progress(missing, "pictures"):
            self._draw(one, start)

    def _draw(self, one: Contender, start: int) -> None:
        some = self._batch(start)
        weight, negative = self.guidance.weight, self.guidance.negative
        (batch,) = drawn_batches(
            one.model.diffusion, some, self.steps, weight, size=len(some), latents=True, negative=negative
        )
        latents = [*batch.latents, batch.final]
        arrays = {"images": mx.array(one.model.decoded(batch.final))}
        if one is self.reference:
            arrays["latents"] = mx.stack(latents)
        else:
            arrays["trajectory"] = mx.array(self._deviation(latents, start).astype(np.float32))
        self._kept(one, start).save(arrays)

    def _deviation(self, latents: Sequence[mx.array], start: int) -> Array:
        """[steps + 1, batch]"""
        exact = self._read(self.reference, start)["latents"]
        return trajectory_error([np.array(latent) for latent in latents], list(np.array(exact)))

    def images(self, one: Contender) -> Iterator[Array]:
        """A model's pictures [batch,H,W,3] in [0,1], batch by batch."""
        for start in self.starts:
            yield np.array(self._read(one, start)["images"])

    def trajectory(self, one: Contender) -> Array:
        """Relative deviation [steps + 1, prompts] of the latents that enter each step, and of the last, from the
        reference's.
        """
        return np.concatenate([np.array(self._read(one, start)["trajectory"]) for start in self.starts], axis=1)

    def latents(self, count: int) -> mx.array:
        """The reference's latents [steps, count, H, W, C] before each step, of the first prompts: at most a batch."""
        return self._read(self.reference, 0)["latents"][:-1, :count]

    def _batch(self, start: int) -> Sequence[Prompt]:
        return self.prompts[start : start + self.starts.step]

    def _kept(self, one: Contender, start: int) -> KeptArrays:
        path = self.folder / one.folder / f"{start:04d}.safetensors"
        return KeptArrays(path, KIND, self.job(one, start), "its pictures are then drawn again")

    def job(self, one: Contender, start: int) -> str:
        """What determines a batch of drawings, as one digest."""
        facts = {
            "model": one.source,
            "reference": self.reference.source,
            "prompts": [[p.seed, p.text] for p in self._batch(start)],
            "steps": self.steps,
            **self.guidance.facts,
            "latent_shape": one.model.diffusion.latent_shape,
            **({} if (sampler := one.model.diffusion.sampler) is None else {"sampler": sampler}),
        }
        return checked.digest(facts | checked.versions())

    def _read(self, one: Contender, start: int) -> dict[str, mx.array]:
        found = self._kept(one, start).load()
        assert found is not None  # ``draw`` came first
        return found[0]
