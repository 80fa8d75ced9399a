"""What a model's predictions are judged by when its weights are rounded: how large an error of them is, and in which
directions errors inside of the model grow.

For a small error d at some place of the model the prediction changes by J d, and that costs dᵀ Jᵀ M J d, where M is the
Hessian of what one cares about in the prediction. ``slopes`` draws vectors s with E[s sᵀ] = M, so a backward pass from
them gives vectors g = Jᵀ s whose outer products are, on average, the Hessian at that place (the Gauss-Newton matrix, of
which ``curvature.sensitivity`` has the diagonal).

Pictures are judged by the guided prediction, for guidance multiplies errors: at weight 2 one of the guided row counts
four times. But people change the weight of guidance, so each side counts by itself, too, a quarter. Text is judged by
the divergence of the next token's distribution, whose Hessian is Fisher's information: there s is the gradient of the
logarithm of a token that is drawn from the model's own prediction (arXiv 2505.22988, section 3.2). Of anything else
that a module returns every number counts alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..models.adapter import Adapter
from ..models.stages import State
from ..numerics.arrays import Array

BRANCH = 0.25  # how much the error of one side of guidance counts beside that of the guided prediction


class Objective(Protocol):
    """How predictions are judged. ``prompted`` says of each row whether it has its prompt."""

    def slopes(self, predicted: State, prompted: Sequence[bool], seed: int) -> State:
        """A random vector in the shape of a prediction, whose outer product is on average the Hessian of ``errors``,
        but for a factor.
        """
        ...

    def errors(self, predicted: State, exact: State, prompted: Sequence[bool]) -> Array:
        """How far a prediction is from the exact one: float64 [samples]."""
        ...


def _signs(shape: Sequence[int], key: mx.array) -> mx.array:
    return mx.random.bernoulli(0.5, shape, key).astype(mx.float32) * 2 - 1


def _energy(values: State) -> float:
    """The sum of all squares."""
    return sum(float(mx.square(value.astype(mx.float32)).sum()) for value in values.values())


def _squares(difference: mx.array) -> Array:
    """Mean square of each row, float64 [rows]."""
    return np.array(mx.square(difference).reshape(len(difference), -1).mean(1), np.float64)


@dataclass(frozen=True)
class EveryNumber:
    """All that is predicted counts alike, relative to how large it is. A batch is one sample."""

    def slopes(self, predicted: State, prompted: Sequence[bool], seed: int) -> State:
        keys, size = mx.random.split(mx.random.key(seed), len(predicted)), _energy(predicted) ** 0.5 or 1.0
        drawn = zip(predicted.items(), keys, strict=True)
        return {name: _signs(value.shape, key) / size for (name, value), key in drawn}

    def errors(self, predicted: State, exact: State, prompted: Sequence[bool]) -> Array:
        wrong = _energy({name: value.astype(mx.float32) - exact[name] for name, value in predicted.items()})
        signal = _energy(exact)
        return np.array([wrong / signal if signal > 0 else wrong])


@dataclass(frozen=True)
class GuidedPrediction:
    """The prediction ``u + weight (c - u)``, with each of its ``sides`` for itself: rows of a picture follow each
    other, first with its prompt.
    """

    adapter: Adapter
    weight: float
    sides: int

    def slopes(self, predicted: State, prompted: Sequence[bool], seed: int) -> State:
        found = State()
        for (name, value), key in zip(
            predicted.items(), mx.random.split(mx.random.key(seed), len(predicted)), strict=True
        ):
            both, alone = mx.random.split(key, 2)
            together = mx.repeat(_signs((len(value) // self.sides, *value.shape[1:]), both), self.sides, axis=0)
            found[name] = self._share(prompted, value) * together + BRANCH**0.5 * _signs(value.shape, alone)
        return self.adapter.judged(found)

    def errors(self, predicted: State, exact: State, prompted: Sequence[bool]) -> Array:
        wrong = self.adapter.judged({name: value.astype(mx.float32) - exact[name] for name, value in predicted.items()})
        found = np.zeros(len(prompted) // self.sides)
        for value in wrong.values():
            shares = (self._share(prompted, value) * value).reshape(-1, self.sides, *value.shape[1:]).sum(1)
            found += _squares(shares) + BRANCH * _squares(value).reshape(-1, self.sides).sum(1)
        return found

    def _share(self, prompted: Sequence[bool], like: mx.array) -> mx.array:
        """What each row counts in the guided prediction, [rows, 1, ...]; where only one side is asked for, all."""
        shares = [(self.weight if side else 1 - self.weight) if self.weight not in (0, 1) else 1 for side in prompted]
        return mx.array(shares, mx.float32).reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class NextToken:
    """The distribution of the next token, by logits [B,T,V]."""

    def slopes(self, predicted: State, prompted: Sequence[bool], seed: int) -> State:
        found, keys = State(), mx.random.split(mx.random.key(seed), len(predicted))
        for (name, logits), key in zip(predicted.items(), keys, strict=True):
            logits = logits.astype(mx.float32)
            drawn = mx.random.categorical(logits, key=key)[..., None]
            found[name] = mx.softmax(logits, -1) - (mx.arange(logits.shape[-1]) == drawn)
        return found

    def errors(self, predicted: State, exact: State, prompted: Sequence[bool]) -> Array:
        """The Kullback-Leibler divergence from the exact distribution, in nats a token."""
        found = np.zeros(len(prompted))
        for name, logits in predicted.items():
            ours, theirs = (
                value - mx.logsumexp(value, -1, keepdims=True) for value in (logits.astype(mx.float32), exact[name])
            )
            found += np.array((mx.exp(theirs) * (theirs - ours)).sum(-1).reshape(len(prompted), -1).mean(1), np.float64)
        return found
