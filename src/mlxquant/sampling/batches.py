"""Prompts drawn batch by batch: the one loop behind calibration, trajectory files, evaluation and ``Model.images``.

Which prompts are drawn together decides the last bits of a picture, so batches are always cut at the same places: a run
that goes on after a kill names the batches that it still lacks, and draws the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from ..progress import Progress, silent
from .prompts import Prompt
from .sampler import SamplerStep


class Sampled(Protocol):
    """A model that can be drawn with; ``models.diffusion.DiffusionAdapter`` is one."""

    @property
    def batch(self) -> int:
        """How many pictures it samples at once."""
        ...

    def prepare(self, prompts: Iterable[Prompt], negative: str | None = None) -> None:
        """Encode prompts, and the negative one or the empty one."""
        ...

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        cfg: float | None = None,
        callback: Callable[[SamplerStep], None] | None = None,
        negative: str | None = None,
    ) -> mx.array:
        """Latents [B,H,W,C] for prompts, one seed each."""
        ...


@dataclass(frozen=True)
class DrawnBatch:
    """Pictures that were drawn together: their ``places`` among all prompts, their ``prompts``, the ``final`` latents
    [b,H,W,C], and, where they were asked for, the ``latents`` [b,H,W,C] that the model read at each noise level, the
    last ones where it was asked twice.
    """

    places: range
    prompts: tuple[Prompt, ...]
    final: mx.array
    latents: list[mx.array]


def drawn_batches(
    model: Sampled,
    prompts: Sequence[Prompt],
    steps: int | None,
    cfg: float | None,
    progress: Progress = silent,
    label: str = "sampling",
    *,
    size: int | None = None,
    starts: Iterable[int] | None = None,
    latents: bool = False,
    callback: Callable[[SamplerStep], None] | None = None,
    negative: str | None = None,
) -> Iterator[DrawnBatch]:
    """Draw ``prompts``, each with its own seed, ``size`` at a time (None: as many as the model samples at once).

    Args:
        model: What draws; it encodes all prompts before the first batch.
        prompts: All of them, also those that are not drawn this time.
        steps: Of the sampler; None for the model's own.
        cfg: The weight of guidance; None for the model's own.
        progress: Wraps the batches.
        label: What to call them there.
        size: Pictures of a batch.
        starts: The batches to draw, by the place of their first prompt; None for all.
        latents: Whether to keep the latents that enter each step, see ``DrawnBatch``.
        callback: Called before each step of each batch.
        negative: The negative prompt; None for none.
    """
    size = model.batch if size is None else size
    places = list(range(0, len(prompts), size) if starts is None else starts)
    if places:
        model.prepare(prompts, negative)
    for start in progress(places, label):
        some, seen = tuple(prompts[start : start + size]), dict[float, mx.array]()

        def follow(step: SamplerStep, seen: dict[float, mx.array] = seen) -> None:
            if latents:
                seen[step.sigma] = step.latent
            if callback is not None:
                callback(step)

        final = model.generate([p.text for p in some], [p.seed for p in some], steps, cfg, follow, negative)
        yield DrawnBatch(range(start, start + len(some)), some, final, [*seen.values()])
