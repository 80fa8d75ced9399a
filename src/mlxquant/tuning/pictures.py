"""Tuned on the prediction of a model that draws, where its own trajectories pass.

A sample is a picture at a step of the sampler. Its error is that of the guided prediction ``e = e_u + w (e_c - e_u)``,
and so that a user may change guidance each side counts, too:

    |e|^2 + branches (|e_c|^2 + |e_u|^2),  averaged over the latent

times what a squared error costs at the sampler's step, relative to the mean over the steps: for a flow the square of
the step of sigma, by which errors move the latent (``Walk.weights``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..calibration.trajectories import Calibration, collect
from ..errors import AdapterError
from ..models.diffusion import DiffusionAdapter
from ..models.stages import State
from ..progress import Progress, silent
from ..recipes.tuning import Tuning
from ..sampling.guidance import asked, sides
from .objective import Pass, Sample, Targets, draw, in_parts, split

HELD_SAMPLES = 112  # at most, and at least one a step where there are so few
Place = tuple[int, int, int]  # whose trajectories (0: the full-precision model's), step, picture


def trajectories(
    teacher: DiffusionAdapter, calibration: Calibration, tuning: Tuning, progress: Progress, folder: Path | None
) -> Calibration:
    """A calibration's trajectories and, where they are of fewer prompts than wanted, more of the model's own prompts.

    Args:
        teacher: The model in full precision.
        calibration: What it drew.
        tuning: How many prompts are wanted.
        progress: Wraps batches that are drawn.
        folder: Keeps those.
    """
    more = tuning.prompts - len(calibration.prompts)
    known = {prompt.text for prompt in calibration.prompts}
    fresh = [prompt for prompt in _own(teacher, tuning.prompts) if prompt.text not in known][: max(0, more)]
    if not fresh or len(calibration.sigmas) != len(teacher.sigmas(calibration.steps)) - 1:  # a part of the steps
        return replace(calibration, samples=None)
    guidance = calibration.guidance
    drawn = collect(teacher, fresh, calibration.steps, guidance.weight, progress, None, folder, guidance.negative)
    return replace(
        calibration,
        prompts=(*calibration.prompts, *fresh),
        latents=mx.concatenate([calibration.latents, drawn.latents], axis=1),
        samples=None,
    )


def _own(teacher: DiffusionAdapter, count: int) -> list[Any]:
    """The model's own prompts, as many as there are of so many."""
    while count:
        try:
            return list(teacher.prompts("calibration", count))
        except AdapterError:  # it has fewer
            count //= 2
    return []


class Pictures:
    """The objective of a model that draws.

    Args:
        teacher: The model in full precision.
        drawn: Its trajectories.
        tuning: Settings.
        others: The trajectories of another model from the same prompts, which every second sample is then of.
    """

    def __init__(
        self, teacher: DiffusionAdapter, drawn: Calibration, tuning: Tuning, others: Calibration | None = None
    ):
        self._teacher, self._tuning = teacher, tuning
        self._sources = [drawn] if others is None else [drawn, others]
        self._guidance, self._levels = drawn.guidance, [float(sigma) for sigma in drawn.sigmas]
        self._train, held = split(len(drawn.prompts), tuning.held_out, "prompts")
        weights = teacher.walk(drawn.steps).weights(teacher.parameterization, drawn.sigmas)
        self._weights = weights / weights.mean()
        texts = list(dict.fromkeys(prompt.text for prompt in drawn.prompts))
        self._text = [texts.index(prompt.text) for prompt in drawn.prompts]
        self._both = teacher.both_sides(texts, self._guidance)
        self._sides = len(sides(self._guidance))
        self._known: dict[Sample, int] = {}
        self._targets = mx.zeros((0,))
        steps = len(self._levels)
        each = max(1, min(steps, HELD_SAMPLES // len(held)))  # steps a picture
        self._held: list[Sample] = [
            (source, (place + number * steps // each) % steps, picture)
            for source in range(len(self._sources))
            for place, picture in enumerate(held)
            for number in range(each)
        ]

    @property
    def held_out(self) -> Sequence[Sample]:
        return self._held

    @property
    def facts(self) -> dict[str, Any]:
        held = len({picture for _, _, picture in cast(list[Place], self._held)})
        policy = {"on_policy": True} if len(self._sources) > 1 else {}
        return {"prompts": len(self._train), "held_out_prompts": held, "levels": len(self._levels), **policy}

    def minibatch(self, iteration: int) -> list[Sample]:
        """Pictures at random, at steps that are spread evenly over all."""
        count, steps = self._tuning.batch, len(self._levels)
        pictures = draw(self._tuning.seed, iteration, self._train, count)
        random = np.random.default_rng([self._tuning.seed, iteration, 1])
        spread = (random.integers(steps) + np.arange(count) * steps // count) % steps
        return [
            (place % len(self._sources), int(step), picture)
            for place, (step, picture) in enumerate(zip(random.permutation(spread), pictures, strict=True))
        ]

    @property
    def _apart(self) -> bool:
        """Whether the sides of a picture are passes of their own."""
        return self._guidance.alone or self._teacher.rows < self._sides

    def groups(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        return in_parts(samples, 1 if self._apart else max(1, self._teacher.rows // self._sides))

    def passes(self, group: Sequence[Sample]) -> list[Pass]:
        places = cast(Sequence[Place], group)
        latent = mx.stack([self._sources[source].latents[step, picture] for source, step, picture in places])
        read = mx.array([self._text[picture] for _, _, picture in places])
        text, other = (side.take(read) for side in self._both)
        sigma = np.array([self._levels[step] for _, step, _ in places])
        found = list[Pass]()
        guidance = replace(self._guidance, alone=True) if self._apart else self._guidance
        for some, conditioning in asked(latent, text, other, guidance):
            levels = np.tile(sigma, len(some) // len(sigma))
            level = float(levels[0]) if (levels == levels[0]).all() else levels
            found.append((self._teacher.state(some, conditioning, level), level))
        return found

    def _predicted(self, predicted: list[State]) -> mx.array:
        """[sides, B, H, W, C] float32, as the sampler has it."""
        rows = []
        for state in predicted:
            (value,) = state.values()
            rows.append(
                self._teacher.parameterization.prediction(self._teacher.unpack(value.astype(mx.float32), self._shape))
            )
        joined = mx.concatenate(rows)
        return joined.reshape(self._sides, -1, *joined.shape[1:])

    @property
    def _shape(self) -> tuple[int, int, int]:
        _, _, height, width, channels = self._sources[0].latents.shape
        return height, width, channels

    def targets(self, samples: Sequence[Sample], progress: Progress = silent) -> Targets:
        """``velocity`` [samples, sides, H, W, C] float32."""
        found = list[mx.array]()
        for group in progress(self.groups(samples), "predictions to tune for"):
            states = [self._teacher.run(state, sigma) for state, sigma in self.passes(group)]
            found.append(self._predicted(states).swapaxes(0, 1))
            mx.eval(found[-1])
        return {"velocity": mx.concatenate(found)}

    def know(self, samples: Sequence[Sample], targets: Targets) -> None:
        self._known = {sample: place for place, sample in enumerate(samples)}
        self._targets = targets["velocity"]

    def loss(self, group: Sequence[Sample], predicted: list[State]) -> mx.array:
        wanted = self._targets[mx.array([self._known[sample] for sample in group])].swapaxes(0, 1)
        weights = mx.array([self._weights[step] for _, step, _ in cast(Sequence[Place], group)], mx.float32)
        error = self._predicted(predicted) - wanted
        if self._sides == 1:
            squares = mx.square(error[0])
        else:
            guided = error[1] + self._guidance.weight * (error[0] - error[1])
            squares = mx.square(guided) + self._tuning.branches * mx.square(error).sum(0)
        return (squares.reshape(len(group), -1).mean(1) * weights).sum()
