"""A sampler's steps as data: where it stops, and the numbers that each of its steps is made of.

Every sampler here takes linear steps. The next latent is a sum of the latent, what the model just predicted, what it
predicted before that, and fresh noise, each times a number that depends on noise levels alone. So a scheduler does not
run: it computes the numbers of all steps, in float64, and one ``step`` serves all schedulers. What a step does to an
error of a prediction can then be read off: that is its gain.

What a walk does not know is what the model predicts. It says which ``kind`` of prediction it computes with, and
``Parameterization`` makes it of any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..errors import AdapterError
from .parameterizations import Parameterization
from .schedules import Sigmas, noise_level


@dataclass(frozen=True)
class Walk:
    """The n steps of a sampler. All arrays are float64.

    Attributes:
        alphas: [n+1]. Before step i the model reads ``alphas[i] image + sigmas[i] noise``; the last is where the walk
            ends.
        sigmas: [n+1].
        kind: The prediction that steps compute with, one of ``parameterizations.KINDS``.
        carry: [n], what step i multiplies the latent with.
        now: [n], and the newest prediction.
        before: [n,h], and the h predictions before that, the last one first; 0 where a step has none.
        fresh: [n], and fresh standard normal noise; 0 where a step has none.
        scales: [n+1], what the latent is multiplied with before the model reads it.
        start: What standard normal noise is multiplied with, to begin with.
        clip: The largest size of a pixel of a predicted image; None for any. Then ``kind`` is "sample".
        unclipped: [n], what step i multiplies the newest prediction with as it was before it was clipped.
    """

    alphas: Sigmas
    sigmas: Sigmas
    kind: str
    carry: Sigmas
    now: Sigmas
    before: Sigmas
    fresh: Sigmas
    scales: Sigmas
    start: float = 1.0
    clip: float | None = None
    unclipped: Sigmas | None = None

    def __len__(self) -> int:
        return len(self.carry)

    @property
    def memory(self) -> int:
        """How many predictions a step may need, beside the newest."""
        return self.before.shape[1]

    @property
    def levels(self) -> Sigmas:
        """The noise levels [n+1] in [0,1], descending; see ``schedules``."""
        return noise_level(self.alphas, self.sigmas)

    def since(self, first: int) -> Walk:
        """The steps from ``first`` on, for a latent that begins there.

        A solver with a history has none then, and a short one for some steps: what it would give predictions that were
        not made goes to the newest, which makes the first step one of order 1.
        """
        now, before = self.now[first:].copy(), self.before[first:].copy()
        for index in range(min(before.shape)):
            now[index] += before[index, index:].sum()
            before[index, index:] = 0
        rest = {name: getattr(self, name)[first:] for name in ("alphas", "sigmas", "carry", "fresh", "scales")}
        unclipped = None if self.unclipped is None else self.unclipped[first:]
        return replace(self, **rest, now=now, before=before, unclipped=unclipped)

    def begin(self, noise: mx.array, image: mx.array | None = None) -> mx.array:
        """The latent before the first step.

        Args:
            noise: Standard normal, in any shape.
            image: What is drawn from, in that shape; None where the walk begins at noise alone.
        """
        if image is None:
            return noise if self.start == 1 else noise * self.start
        alpha, sigma, scale = float(self.alphas[0]), float(self.sigmas[0]), float(self.scales[0])
        return (image * alpha + noise * sigma) / scale

    def read(self, index: int, latent: mx.array) -> mx.array:
        """What the model is shown of the latent before step ``index``."""
        return latent if self.scales[index] == 1 else latent * float(self.scales[index])

    def step(
        self, index: int, latent: mx.array, predictions: Sequence[mx.array], fresh: mx.array | None = None
    ) -> mx.array:
        """The latent after step ``index``.

        Args:
            index: From 0.
            latent: Before it, in any shape.
            predictions: What the model predicted, of the walk's kind, in that shape: now, and before that, the last
                first, as many as there are up to ``memory``.
            fresh: Standard normal noise in that shape; needed where ``self.fresh[index]`` is not 0.

        Raises:
            AdapterError: A step that adds noise was given none.
        """
        now = predictions[0] if self.clip is None else mx.clip(predictions[0], -self.clip, self.clip)
        after = latent * float(self.carry[index]) + now * float(self.now[index])
        if self.unclipped is not None:
            after = after + predictions[0] * float(self.unclipped[index])
        for weight, earlier in zip(self.before[index].tolist(), predictions[1:], strict=False):
            if weight:
                after = after + earlier * weight
        if self.fresh[index]:
            if fresh is None:
                raise AdapterError(f"step {index} of this sampler adds noise, and was given none; hand it seeds")
            after = after + fresh * float(self.fresh[index])
        return after

    def gains(self, parameterization: Parameterization) -> Sigmas:
        """How far a unit of error of a model's prediction at each level [n] moves what the model reads next.

        In the units of what it reads, in which schedulers that walk the same path agree. A solver with a history uses a
        prediction twice, with opposite signs; errors of neighbouring steps are nearly the same, so what counts is the
        sum, which is what a solver without a history would do.
        """
        both = self.now + self.before.sum(axis=1) + (0 if self.unclipped is None else self.unclipped)
        levels = zip(self.alphas[:-1], self.sigmas[:-1], strict=True)
        of_prediction = [parameterization.weights(self.kind, float(a), float(s))[1] for a, s in levels]
        return np.abs(both * of_prediction * self.scales[1:])

    def weights(self, parameterization: Parameterization, levels: npt.ArrayLike) -> Sigmas:
        """What a unit of squared error of a prediction costs at some noise levels, relative to the mean over the steps.

        It is the square of the gain, of steps at one level of all together; between two levels the linear
        interpolation, outside that of the nearest one.

        Args:
            parameterization: What the model predicts.
            levels: [L] in [0,1].

        Returns:
            [L].
        """
        own, places = np.unique(-self.levels[:-1], return_inverse=True)
        gains = np.bincount(places, self.gains(parameterization))
        squares = gains**2 / np.mean(gains**2)
        return np.interp(np.asarray(levels, np.float64), -own[::-1], squares[::-1])
