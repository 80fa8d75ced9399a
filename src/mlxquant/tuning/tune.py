"""Tune the scales of a quantized model, its codes frozen: Adam on what the model predicts, kept only where it helps.

Two judges look at samples that nothing is learned from. While the model is tuned its twins are judged now and then: the
best numbers so far are those that are used. How far a step may go hangs on how good the codes are already, and nobody
knows that beforehand: where none have been better for a while the run goes back to the best and on at a quarter of the
rate, and where that does not help either it ends. Then what would be stored is judged against what was there, both on
the layers that run: the tuned model is kept only if its held-out loss is lower.

Samples of an iteration are a function of the seed and the iteration, so a run that is killed and resumed from what a
folder keeps ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import cos, inf, isfinite, pi
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..curvature.backward import Slopes
from ..errors import NumericsError
from ..layers.kinds import find_layers
from ..layers.tree import set_module, swapped
from ..models.adapter import Adapter
from ..models.stages import State
from ..progress import Progress, silent
from ..recipes.tuning import Tuning
from .backward import Twins
from .kept import Kept
from .objective import Objective, Sample
from .twin import Numbers, tuned, widened

WARM_UP = 20  # iterations, but no more than a tenth of all
CHECKS = 12  # looks at the held-out loss
PATIENCE = 2  # of them without a better one: back to the best, and slower
SLOWER, SLOWED = 4, 2  # by how much, and how often in a row before the run ends
BETAS, TINY = [0.9, 0.99], 1e-15
LEAST = 1e-30  # of a loss that others are compared with
TARGETS, RUN = "targets", "run"  # what is kept
PLAIN = ("iteration", "best_at", "losses", "worse", "slowed", "slower", "over")  # of a run, what is no array
Replaced = Callable[[str, nn.Module, nn.Module], None]


def know_targets(objective: Objective, tuning: Tuning, kept: Kept, progress: Progress = silent) -> None:
    """Let an objective know what the full-precision model makes of every sample that there will be; once, where it is
    kept.
    """
    drawn = [sample for iteration in range(tuning.iterations) for sample in objective.minibatch(iteration)]
    samples = list(dict.fromkeys([*objective.held_out, *drawn]))
    if (found := kept.load(TARGETS)) is not None:
        objective.know(samples, found[0])
        return
    targets = objective.targets(samples, progress)
    kept.save(TARGETS, targets)
    objective.know(samples, targets)


@dataclass
class Run:
    """How far a run is. Losses are those of what is held out.

    ``worse`` counts those in a row that are no better than the best, ``slowed`` how often in a row the run was slowed
    down for that, and ``slower`` is by how much in all.
    """

    numbers: Numbers
    adam: optim.Adam
    iteration: int = 0
    best: Numbers = field(default_factory=dict)
    best_loss: float = inf
    best_at: int = 0
    losses: list[float] = field(default_factory=list)
    worse: int = 0
    slowed: int = 0
    slower: int = 1
    over: bool = False

    @classmethod
    def begun(cls, numbers: Numbers) -> Run:
        return cls(dict(numbers), _adam(numbers), best=dict(numbers))

    def save(self, kept: Kept) -> None:
        trees = {"numbers": self.numbers, "best": self.best, "adam": self.adam.state}
        kept.save(RUN, trees, {name: getattr(self, name) for name in PLAIN})

    def resume(self, kept: Kept) -> None:
        """Go on where a run of the same job was, if there was one."""
        if (found := kept.load(RUN)) is None:
            return
        trees, facts = found
        self.numbers, self.best, self.adam.state = trees["numbers"], trees["best"], trees["adam"]
        for name in PLAIN:
            setattr(self, name, facts[name])
        self.best_loss = min(self.losses, default=inf)

    def judged(self, loss: float) -> None:
        """Take note of the held-out loss of the numbers; without a better one for a while go on from the best, slower,
        and in the end not at all.
        """
        self.losses.append(loss)
        if loss < self.best_loss:
            self.best, self.best_loss, self.best_at = dict(self.numbers), loss, self.iteration
            self.worse = self.slowed = 0
            return
        self.worse += 1
        if self.worse < PATIENCE:
            return
        self.numbers, self.adam = dict(self.best), _adam(self.best)
        self.worse, self.slowed, self.slower = 0, self.slowed + 1, self.slower * SLOWER
        self.over = self.slowed > SLOWED


class Tuner:
    """Tunes one model.

    Args:
        adapter: The model, quantized.
        objective: What it is tuned towards; it knows its targets.
        tuning: Settings.
    """

    def __init__(self, adapter: Adapter, objective: Objective, tuning: Tuning):
        self._adapter, self._objective, self._tuning = adapter, objective, tuning

    def held_out(self) -> float:
        """The loss of what is held out, a sample, of whatever stands in the model.

        Raises:
            NumericsError: It is NaN or infinite.
        """
        total, samples = 0.0, self._objective.held_out
        for group in self._objective.groups(samples):
            predicted = [self._adapter.run(state, sigma) for state, sigma in self._objective.passes(group)]
            total += float(np.array(self._objective.loss(group, predicted)))
        return self._finite(total / len(samples), "what is held out")

    def _finite(self, loss: float, of: str) -> float:
        if not isfinite(loss):
            raise NumericsError(
                f"{self._adapter.name}: while scales are tuned the loss of {of} is {loss}; use more bits, or leave"
                " 'tuned' out"
            )
        return loss

    def step(self, twins: Twins, run: Run) -> None:
        """One iteration."""
        slopes: Slopes = {}
        for group in self._objective.groups(self._objective.minibatch(run.iteration)):
            _add(slopes, self.slopes(twins, group))
        slopes = {name: slopes.get(name, mx.zeros_like(value)) for name, value in run.numbers.items()}
        run.adam.learning_rate = self._rate(run.iteration) / run.slower
        run.numbers = run.adam.apply_gradients(slopes, run.numbers)
        mx.eval(run.numbers, run.adam.state)
        run.iteration += 1
        twins.numbers.update(run.numbers)

    def slopes(self, twins: Twins, group: Sequence[Sample]) -> Slopes:
        """The gradient of a group's loss, summed over its samples, by name of the numbers."""
        traces = [twins.forward(state, sigma) for state, sigma in self._objective.passes(group)]

        def loss(predicted: list[State]) -> mx.array:
            return self._objective.loss(group, predicted)

        found, of_predicted = mx.value_and_grad(loss)([trace.predicted for trace in traces])
        self._finite(float(np.array(found)), "a batch")
        slopes: Slopes = {}
        for trace, own in zip(traces, of_predicted, strict=True):
            _add(slopes, twins.backward(trace, own))
        return slopes

    def _rate(self, iteration: int) -> float:
        """A short linear rise, then half a cosine down to 0."""
        every = self._tuning.iterations
        warm = min(WARM_UP, max(1, every // 10))
        return self._tuning.rate * min(1.0, (iteration + 1) / warm) * 0.5 * (1 + cos(pi * iteration / every))

    def run(self, twins: Twins, kept: Kept, progress: Progress) -> Run:
        """Tune the numbers of twins."""
        run = Run.begun(twins.numbers)
        run.resume(kept)
        twins.numbers.update(run.numbers)
        every = max(1, -(-self._tuning.iterations // CHECKS))
        with twins.installed():
            if not run.losses:
                run.judged(self.held_out())
            while not run.over and run.iteration < self._tuning.iterations:
                last = min(self._tuning.iterations, (run.iteration // every + 1) * every)
                told = f"tuning scales: held-out loss {run.best_loss / max(run.losses[0], LEAST):.3f} of what it was"
                for _ in progress(range(run.iteration, last), told):
                    self.step(twins, run)
                    if kept.due and run.iteration < last:
                        run.save(kept)
                run.judged(self.held_out())
                twins.numbers.update(run.numbers)
                if kept.due:
                    run.save(kept)
        run.over = True
        run.save(kept)
        return run


def _adam(numbers: Numbers) -> optim.Adam:
    """A fresh one."""
    adam = optim.Adam(0.0, BETAS, TINY, True)
    adam.init(numbers)
    return adam


def _add(slopes: Slopes, more: Slopes) -> None:
    for name, slope in more.items():
        slopes[name] = slopes[name] + slope if name in slopes else slope


def tune(
    adapter: Adapter,
    objective: Objective,
    tuning: Tuning,
    kept: Kept,
    progress: Progress = silent,
    replaced: Replaced | None = None,
) -> dict[str, Any]:
    """Tune a quantized model in place, if that helps.

    Args:
        adapter: The model, quantized.
        objective: What it is tuned towards; it knows its targets.
        tuning: Settings.
        kept: Where the run keeps how far it is.
        progress: Wraps iterations; what they are called says how the held-out loss is.
        replaced: Told of each layer as another takes its place, by its path.

    Returns:
        Facts: the held-out loss before and after, on the layers that run, whether the tuned ones were kept, how many
        numbers were trained and for how many iterations.

    Raises:
        NumericsError: A loss is NaN or infinite.
    """
    places: dict[str, list[str]] = {}
    found, first = find_layers(adapter.module), dict[int, str]()
    for path, layer in found.items():
        places.setdefault(first.setdefault(id(layer), path), []).append(path)
    layers = {path: widened(found[path], tuning.group) for path in places}
    tuner = Tuner(adapter, objective, tuning)
    before = tuner.held_out()
    twins = Twins(adapter, layers, places)
    run = tuner.run(twins, kept, progress)
    made = {path: tuned(layer, path, run.best) for path, layer in layers.items()}
    new: dict[str, nn.Module] = {place: made[path] for path, some in places.items() for place in some}
    with swapped(adapter.module, new):
        after = tuner.held_out()
    better = after < before
    if better:
        for path, module in new.items():
            old = set_module(adapter.module, path, module)
            if replaced is not None:
                replaced(path, old, module)
    return {
        "kept": better,
        "loss_before": before,
        "loss_after": after,
        "iterations": run.iteration,
        "numbers": sum(value.size for value in run.numbers.values()),
        **({"widened": wide} if (wide := sum(layer is not found[path] for path, layer in layers.items())) else {}),
        **objective.facts,
    }
