"""How much an error inside the model matters for what it predicts, at each noise level.

For a small error d at some place the prediction changes by J d. With random signs r, E[(J^T r)_i^2] is the i-th
diagonal entry of J^T J: how much a unit of squared error in channel i there adds to the squared error of the velocity.
One backward pass a batch gives it for all places (Hutchinson's estimator of the Gauss-Newton diagonal, as BRECQ weighs
block errors, arXiv 2102.05426, with the network's output in place of its loss).

What differs between noise levels is how the model amplifies what happens inside it, and what its sampler makes of an
error. A flow's latent moves by the velocity times a step of sigma, errors of the steps add up with nearly the same
sign, and on an even grid a unit of velocity error costs the same anywhere: flows weigh all levels alike. Other
predictions do not: a unit of noise moves the latent far where there is hardly an image in it, and not at all near the
end. There each level is weighed by the square of its step's gain, relative to the mean over the steps
(``sampling.walk``).

Squared velocity error is averaged over the elements of a latent: velocities have about unit variance, so it is relative
to them. Text is judged by the divergence of the next token's distribution in place of a squared error, averaged over
tokens (``LanguageAdapter.weighed``); it has no noise levels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..calibration.data import CalibrationData
from ..calibration.on_demand import OnDemand
from ..calibration.passes import Passes
from ..errors import NumericsError
from ..files.kept_arrays import Measurements
from ..layers.kinds import known_kind
from ..layers.tree import StandIn, get_module, swapped
from ..models.adapter import Adapter
from ..models.stages import Stage, State
from ..numerics.arrays import Array
from .backward import Backward, Slopes, total
from .block_errors import block_errors

LEVELS, BY_BLOCKS = "/sigma", "/by_blocks"  # among tables


@mx.custom_function
def _gauge(x: mx.array, dial: mx.array) -> Any:
    """x [B,...,D] unchanged; ``dial`` [B,D] gets as its gradient the squared gradient of x, summed over tokens, and
    ``dial`` [1,D] that of all of it.
    """
    return x


@_gauge.vjp
def _gauge_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    return cotangent, _energy(cotangent, primals[1].shape[0])


def _energy(slope: mx.array, rows: int) -> mx.array:
    """Squares of a gradient [...,D] of some rows, summed over all but those: [rows,D] float32."""
    return mx.square(slope.astype(mx.float32)).reshape(rows, -1, slope.shape[-1]).sum(1)


class _Gauged(StandIn):
    """A layer whose output is gauged."""

    def __init__(self, layer: nn.Module, path: str, dials: dict[str, mx.array]):
        super().__init__(layer)
        self._path, self._dials = path, dials
        self.width = known_kind(layer).form.outputs(layer)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return cast(mx.array, _gauge(self._layer(x, *args, **kwargs), self._dials[self._path]))


@dataclass(frozen=True)
class Sensitivity:
    """What a unit of mean squared error over a picture's tokens costs in squared velocity error, by noise level
    ``sigma`` [T] ascending.

    Errors of different tokens and channels are taken as independent. ``stages`` by stage name and written tensor [T,D];
    ``layers`` by path of a Linear, for each of its outputs [T,out].
    """

    sigma: Array
    stages: dict[str, dict[str, Array]]
    layers: dict[str, Array]
    by_blocks: bool = False  # costs are relative errors of what blocks write, not errors of the prediction

    @classmethod
    def of(cls, tables: Mapping[str, Array]) -> Sensitivity:
        """From what ``tables`` gave."""
        stages = dict[str, dict[str, Array]]()
        for name, table in tables.items():
            stage, slash, key = name.rpartition("/")
            if slash and stage:
                stages.setdefault(stage, {})[key] = table
        return cls(
            tables[LEVELS].astype(np.float32),
            stages,
            {path: table for path, table in tables.items() if "/" not in path},
            BY_BLOCKS in tables,
        )

    @property
    def tables(self) -> dict[str, Array]:
        """All in one mapping: noise levels as ``/sigma``, what stages write as ``stage/tensor``, layers by path;
        float64.
        """
        wrote = {f"{stage}/{key}": table for stage, tables in self.stages.items() for key, table in tables.items()}
        how = {BY_BLOCKS: np.ones(1)} if self.by_blocks else {}
        return {LEVELS: self.sigma.astype(np.float64), **how, **wrote, **self.layers}

    def of_stage(self, name: str, sigmas: Iterable[float]) -> dict[str, Array] | None:
        """By written tensor [len(sigmas), D], at the measured levels nearest to ``sigmas``; None for a stage that was
        not measured.
        """
        if name not in self.stages:
            return None
        return {key: table[self._nearest(sigmas)] for key, table in self.stages[name].items()}

    def of_outputs(self, path: str, sigmas: Iterable[float]) -> Array | None:
        """Of a layer's outputs [len(sigmas), out], at the measured levels nearest to ``sigmas``; None for one that was
        not measured.
        """
        return self.layers[path][self._nearest(sigmas)] if path in self.layers else None

    def _nearest(self, sigmas: Iterable[float]) -> list[int]:
        return [int(np.abs(self.sigma - sigma).argmin()) for sigma in sigmas]

    def of_layer(self, path: str, sigma: float) -> float:
        """Averaged over a layer's outputs, at the noise level nearest to ``sigma``, relative to the mean over levels; 1
        if unknown.
        """
        if path not in self.layers:
            return 1.0
        costs = self.layers[path].mean(1)
        return float(costs[self._nearest([sigma])[0]] / costs.mean()) if costs.mean() > 0 else 1.0


def measure(
    passes: Passes, stages: Sequence[Stage], states: Sequence[State], layers: Iterable[str], seed: int = 0
) -> Sensitivity:
    """Sensitivities of what stages write and of what Linears inside them write. Rows at the same noise level are
    averaged, ``adapter.rows`` of them are differentiated at once.

    Args:
        passes: The model in full precision, and the noise level of each batch.
        stages: The end of the model's chain.
        states: What enters the first of them, one state [rows, ...] a batch.
        layers: Paths of Linears.
        seed: Draws the random signs.

    Raises:
        NumericsError: A sensitivity is not finite; it names the place.
    """
    adapter = passes.adapter
    probe = _Probe(adapter, stages, layers)
    totals: dict[float, dict[str, Array]] = {}
    rows: dict[float, int] = {}
    with swapped(adapter.module, dict(probe.gauged)):
        for index in passes.indices("sensitivity"):
            state, sigma = states[index], float(np.float32(passes.sigmas[index]))
            count = adapter.rows_in(state)
            with passes.at(index):
                signs = adapter.judged(_signs(probe.predicted(adapter.take(state, slice(1))), count, seed + index))
            elements = sum(int(np.count_nonzero(np.array(value))) for value in signs.values()) // count
            level = totals.setdefault(sigma, {})
            for start in range(0, count, adapter.rows):
                some = slice(start, start + adapter.rows)
                with passes.at(index):
                    found = probe.costs(adapter.take(state, some), adapter.take(signs, some))
                for name, costs in found.items():
                    level[name] = level.get(name, 0.0) + np.array(costs, np.float64).sum(0) / elements
            rows[sigma] = rows.get(sigma, 0) + count
    order = sorted(totals)
    weights = adapter.level_weights(order)[:, None]
    table = {name: np.stack([totals[sigma][name] / rows[sigma] for sigma in order]) * weights for name in probe.names}
    for name, at in table.items():
        if bad := [sigma for sigma, costs in zip(order, at, strict=True) if not np.isfinite(costs).all()]:
            raise NumericsError(
                f"sigma {bad[0]:.4g}: the velocity's gradient with respect to {name} is NaN or infinite; the model"
                " overflows on this input"
            )
    return Sensitivity.of({LEVELS: np.array(order), **table})


def _signs(predicted: State, rows: int, seed: int) -> State:
    """Random signs in the shapes of what is predicted for one row, but for ``rows``, float32."""
    key, found = mx.random.key(seed), State()
    for name, value in predicted.items():
        shape = (rows * value.shape[0], *value.shape[1:])
        found[name] = mx.random.bernoulli(0.5, shape, key).astype(mx.float32) * 2 - 1
        key = mx.random.split(key)[1]  # the first has that of the seed
    return found


class _Probe:
    """One backward pass for some rows. ``gauged`` are the layers to put in place for it, by path."""

    def __init__(self, adapter: Adapter, stages: Sequence[Stage], layers: Iterable[str]):
        self._adapter, self._stages, self._chain = adapter, stages, Backward(stages)
        self._dials: dict[str, mx.array] = {}
        self.gauged = {path: _Gauged(get_module(adapter.module, path), path, self._dials) for path in layers}

    @property
    def names(self) -> list[str]:
        """What there are costs of: ``stage/tensor`` for all but the last stage, then the layers."""
        wrote = zip(self._stages, self._chain.wrote, strict=True)
        return [f"{stage.name}/{key}" for stage, keys in wrote for key in keys] + list(self.gauged)

    def predicted(self, state: State) -> State:
        """What the model predicts, not evaluated. The clock must be set."""
        self._reset(state)
        return self._chain.predicted(state)

    def costs(self, state: State, signs: State) -> dict[str, mx.array]:
        """By name the squared gradient of the prediction times ``signs``, summed over tokens: [rows,D] float32.

        The clock must be set.
        """
        costs: dict[str, mx.array] = {}
        rows = self._reset(state)
        entered = self._chain.forward(state)
        predicted = self._stages[-1].run(entered[-1])  # computed where weighing asks for it
        slopes: Slopes = dict(self._adapter.weighed(signs, {key: predicted[key] for key in signs}))
        for index in reversed(range(len(self._stages))):
            paths = [path for path in self.gauged if self._stages[index].owns(path)]
            slopes, inside = self._chain.backward(index, entered.pop(), slopes, self._dials, paths)
            costs |= inside
            if index:
                before = self._stages[index - 1].name
                wrote = self._chain.wrote[index - 1].items()
                costs |= {f"{before}/{key}": _energy(total(slopes, keys), rows) for key, keys in wrote}
            mx.eval(slopes, costs)
        return costs

    def _reset(self, state: State) -> int:
        """Dials for as many rows as a state has, and how many those are."""
        rows = self._adapter.rows_in(state)
        self._dials.update({path: mx.zeros((rows, layer.width)) for path, layer in self.gauged.items()})
        return rows


SENSITIVITY_ROWS = 8  # of each noise level
UNTIMED_ROWS = 64  # where there are no levels
SENSITIVITY = "sensitivity"  # its file among measurements


def measured(
    passes: Passes,
    stages: Sequence[Stage],
    states: Sequence[State],
    plan: Iterable[str],
    kept: Measurements | None = None,
) -> Sensitivity:
    """``measure`` on a few rows of each noise level, which suffice for an average: the first of its batches, as many as
    one backward pass may have. In batches as the sampler has them these are guided rows, whose errors guidance
    multiplies by more than the others'.

    Args:
        passes: The model in full precision, over all calibration batches.
        stages: The end of the model's chain.
        states: What enters the first of them, one state a batch.
        plan: Paths of the planned layers.
        kept: Where it is kept; what is there already is not measured again.

    Returns:
        What ``measure`` finds, or, where memory does not suffice for a backward pass or something in the model has no
        gradient, ``block_errors``; ``by_blocks`` says so.
    """
    if kept is not None and (tables := kept.load(SENSITIVITY)) is not None:
        return Sensitivity.of(tables)
    wanted = SENSITIVITY_ROWS if passes.adapter.timed else UNTIMED_ROWS
    count, seen, some = min(wanted, passes.adapter.rows), Counter[float](), list[int]()
    for index, sigma in enumerate(passes.sigmas):
        if seen[sigma] < wanted:
            seen[sigma] += min(count, passes.adapter.rows_in(states[index]))
            some.append(index)
    few = OnDemand(lambda index: passes.adapter.take(states[some[index]], slice(count)), range(len(some)))
    try:
        found = measure(passes.some(some), stages, few, plan)
    except (MemoryError, RuntimeError, ValueError):  # MLX's own: no memory, or no gradient of something
        levels, tables = block_errors(passes.some(some), stages, few, plan)
        found = Sensitivity.of({LEVELS: levels, BY_BLOCKS: np.ones(1), **tables})
    if kept is not None:
        kept.save(SENSITIVITY, found.tables)
    return found


def sensitivity_job(calibration: CalibrationData, plan: Iterable[str]) -> dict[str, Any]:
    """What sensitivities depend on, for ``Measurements``: not on how the layers of ``plan`` are quantized."""
    return {"calibration": calibration.record, "layers": list(plan)}
