"""Tuned on what a language model predicts: windows of its calibration text.

A sample is a window. Its loss is the divergence of the next token's probabilities from those of the full-precision
model, KL(p || q), averaged over its tokens (distillation, arXiv 1503.02531, at temperature 1). Of the full-precision
model the hidden states before its head are kept, not its logits, which are a vocabulary wide; its head is run again
when they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from ..calibration.text import TextCalibration
from ..models.language import NO_TIME, LanguageAdapter
from ..models.stages import State
from ..progress import Progress, silent
from ..recipes.tuning import Tuning
from .objective import Pass, Sample, Targets, draw, in_parts, split

HIDDEN, WINDOWS = "hidden", "windows"


class Text:
    """The objective of a language model.

    Args:
        teacher: The model in full precision.
        calibration: Its windows.
        tuning: Settings.
    """

    def __init__(self, teacher: LanguageAdapter, calibration: TextCalibration, tuning: Tuning):
        self._teacher, self._tuning, self._windows = teacher, tuning, mx.array(calibration.windows)
        self._train, held = split(len(calibration.windows), tuning.held_out, WINDOWS)
        self._held: list[Sample] = list(held)
        self._known: dict[Sample, int] = {}
        self._hidden = mx.zeros((0,))

    @property
    def held_out(self) -> Sequence[Sample]:
        return self._held

    @property
    def facts(self) -> dict[str, Any]:
        return {"windows": len(self._train), "held_out_windows": len(self._held)}

    def minibatch(self, iteration: int) -> list[Sample]:
        """Windows at random."""
        return list(draw(self._tuning.seed, iteration, self._train, self._tuning.batch))

    def groups(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        return in_parts(samples, self._teacher.rows)

    def _tokens(self, group: Sequence[Sample]) -> mx.array:
        return self._windows[mx.array(cast(list[int], list(group)))]

    def passes(self, group: Sequence[Sample]) -> list[Pass]:
        return [({"tokens": self._tokens(group)}, NO_TIME)]

    def targets(self, samples: Sequence[Sample], progress: Progress = silent) -> Targets:
        """``hidden`` [samples, T, D] float32: what enters the head."""
        found = list[mx.array]()
        with self._teacher.clock.at(NO_TIME):
            for group in progress(self.groups(samples), "predictions to tune for"):
                state: State = {"tokens": self._tokens(group)}
                for stage in self._teacher.stages[:-1]:
                    state = stage.run(state)
                mx.eval(state)
                found.append(state[HIDDEN])
        hidden = mx.concatenate(found)
        mx.eval(hidden)
        return {HIDDEN: hidden}

    def know(self, samples: Sequence[Sample], targets: Targets) -> None:
        self._known = {sample: place for place, sample in enumerate(samples)}
        self._hidden = targets[HIDDEN]

    def loss(self, group: Sequence[Sample], predicted: list[State]) -> mx.array:
        (state,) = predicted
        places = mx.array([self._known[sample] for sample in group])
        with self._teacher.clock.at(NO_TIME):
            head = self._teacher.stages[-1].run({"tokens": self._tokens(group), HIDDEN: self._hidden[places]})
        wanted, made = (_log_softmax(logits["logits"]) for logits in (head, state))
        return (mx.exp(wanted) * (wanted - made)).sum(-1).mean(1).sum()


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
