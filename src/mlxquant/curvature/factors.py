"""How errors of a layer's outputs add up in the prediction: the two factors of its Hessian.

An error D of a weight changes the prediction by J vec(D), and with gradients g_t of a random vector there (see
``calibration.objectives``) at each token t with its input x_t, the Hessian of what that costs is E[vec G vec Gᵀ], G =
Σ_t g_t x_tᵀ [out,in], one G a sample. It is far too large to be kept, and taken to be H_O ⊗ H_I. Two sketches of
the factors (arXiv 2505.22988, section 3.2):

- "A" takes tokens for independent: H_I = E[|g|² x xᵀ], H_O = E[|x|² g gᵀ].
- "B" keeps what tokens of a sample have in common: H_I = E[Gᵀ G], H_O = E[G Gᵀ].

``measure`` goes through the model once, forward and backward, and keeps what enters each stage and the gradients at
what leaves it. From these the factors of one stage are made when its turn comes, so that those of one stage are in
memory at a time: for a layer 6144 wide they take 150 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..calibration.passes import Passes
from ..calibration.probes import Probes
from ..errors import NumericsError
from ..layers.kinds import known_kind
from ..layers.tree import StandIn, get_module, swapped
from ..models.adapter import Adapter
from ..models.stages import Stage, State, written
from ..numerics.arrays import Array
from ..progress import Progress, silent
from ..recipes.recipe import SKETCHES
from .backward import Backward, Slopes

ROWS = 512  # that are differentiated at most
HELD = 4 * 2**30  # bytes of what is kept of them at most, and of factors


@dataclass(frozen=True)
class Factors:
    """H_I [in,in] and H_O [out,out] of a layer, float32, each but for a factor."""

    inputs: Array
    outputs: Array


@dataclass(frozen=True)
class LayerCurvature:
    """What is known of a layer: ``gram`` [in,in] of the full-precision inputs, over ``tokens`` of them, and its factors
    by sketch; none where no error of its outputs reaches the prediction.
    """

    gram: Array
    tokens: int
    factors: dict[str, Factors]

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return self.gram.nbytes + sum(some.inputs.nbytes + some.outputs.nbytes for some in self.factors.values())


class _Watched(StandIn):
    """A layer that notes what it is called with, and adds a dial to what it answers where there is one."""

    def __init__(self, layer: nn.Module, path: str, calls: list[tuple[str, Any, mx.array]], dials: dict[str, mx.array]):
        super().__init__(layer)
        self._path, self._calls, self._dials = path, calls, dials

    def __call__(self, x: mx.array, *where: Any, **named: Any) -> mx.array:
        answer: mx.array = self._layer(x, *where, **named)
        name = f"{self._path} {len(self._calls)}"  # a layer may be called several times
        self._calls.append((self._path, (x, *where, *named.values()), answer))
        return answer + self._dials[name] if name in self._dials else answer


@dataclass(frozen=True)
class Curvature:
    """What ``measure`` has kept: for each batch what enters each stage and the gradients at what leaves it."""

    chain: Backward
    sigmas: Sequence[float]
    sides: int
    entered: Sequence[Sequence[State]]
    slopes: Sequence[Sequence[Slopes]]
    _made: dict[str, LayerCurvature] = field(default_factory=dict, compare=False)  # as many as ``HELD`` bytes have room

    @property
    def rows(self) -> int:
        """That were differentiated."""
        return sum(len(next(iter(slopes[-1].values()))) for slopes in self.slopes)

    def of_stage(
        self,
        adapter: Adapter,
        stage: Stage,
        paths: Iterable[str],
        sketches: Sequence[str] = SKETCHES,
        progress: Progress = silent,
    ) -> dict[str, LayerCurvature]:
        """The factors of some layers of a stage, by path. Layers whose kind has no outputs that can be told by token,
        and those of several parts, are left out. The stage of the ``adapter``, the model or a copy, must be in full
        precision.
        """
        known, wanted = dict[str, LayerCurvature](), list[str]()
        for path in paths:
            layer = get_module(adapter.module, path)
            if path in self._made and set(sketches) <= self._made[path].factors.keys():
                known[path] = self._made[path]
            elif known_kind(layer).tells_outputs(layer):
                wanted.append(path)
        if not wanted:
            return known
        found: dict[str, _Sums] = {}
        passes = Passes(adapter, self.sigmas, progress, exact=True)
        for batch in passes.indices(f"{stage.name}: factors"):
            for path, inputs, slopes in self._seen(passes, stage, batch, wanted):
                found.setdefault(path, _Sums(inputs.shape[-1], slopes.shape[-1], sketches)).add(inputs, slopes)
        new = {path: sums.found(path) for path, sums in found.items()}
        for path, one in new.items():
            if sum(other.nbytes for other in self._made.values()) + one.nbytes <= HELD:
                self._made[path] = one
        return known | new

    def _seen(
        self, passes: Passes, stage: Stage, batch: int, paths: Sequence[str]
    ) -> Iterable[tuple[str, Array, Array]]:
        """Inputs [samples, tokens, in] of these layers in a batch, of all their calls, and the gradients of what they
        answered [samples, tokens, out].
        """
        adapter, index = passes.adapter, list(passes.adapter.stages).index(stage)
        calls, dials = list[tuple[str, Any, mx.array]](), dict[str, mx.array]()
        watched = {path: _Watched(get_module(adapter.module, path), path, calls, dials) for path in paths}
        state, slopes = self.entered[batch][index], self.slopes[batch][index]
        with swapped(adapter.module, dict(watched)), passes.at(batch):
            stage.run(state)
            noted, names = list(calls), [f"{path} {place}" for place, (path, _, _) in enumerate(calls)]
            dials.update({name: mx.zeros(call[2].shape) for name, call in zip(names, noted, strict=True)})
            calls.clear()
            _, found = self.chain.on(adapter.stages).backward(index, state, slopes, dials, names)
            mx.eval(found, [call[1][0] for call in noted])
        rows, seen = adapter.rows_in(state), dict[str, list[tuple[Array, Array]]]()
        for name, (path, call, _) in zip(names, noted, strict=True):
            layer = watched[path]._layer
            form = known_kind(layer).form
            (inputs,) = form.read(layer, *call).parts
            gradients = form.read_outputs(layer, found[name], *call)
            sides = self.sides if len(inputs) == rows else len(inputs)  # what nobody can tell apart is one sample
            read, wrong = (v.reshape(len(v) // sides, -1, v.shape[-1]) for v in (inputs, gradients))
            seen.setdefault(path, []).append((read, wrong))
        for path, each in seen.items():
            if len(each) > 1 and len({len(read) for read, _ in each}) == 1:  # calls for the same samples add up in each
                each = [(np.concatenate([c[0] for c in each], 1), np.concatenate([c[1] for c in each], 1))]
            for read, wrong in each:
                yield path, read, wrong


class _Sums:
    """Adds up a layer's factors."""

    def __init__(self, width: int, outputs: int, sketches: Sequence[str]):
        self._gram, self._tokens = np.zeros((width, width), np.float32), 0
        self._sums = {
            name: [np.zeros((width, width), np.float32), np.zeros((outputs, outputs), np.float32)] for name in sketches
        }

    def add(self, inputs: Array, slopes: Array) -> None:
        """Of inputs [samples, tokens, in] and gradients [samples, tokens, out], float32."""
        x, g = inputs.reshape(-1, inputs.shape[-1]), slopes.reshape(-1, slopes.shape[-1])
        self._gram += x.T @ x
        self._tokens += len(x)
        if "A" in self._sums:
            by_input, by_output = self._sums["A"]
            by_input += x.T @ (x * np.einsum("to,to->t", g, g)[:, None])
            by_output += g.T @ (g * np.einsum("ti,ti->t", x, x)[:, None])
        if "B" in self._sums:
            by_input, by_output = self._sums["B"]
            for read, wrong in zip(inputs, slopes, strict=True):
                together = wrong.T @ read
                by_input += together.T @ together
                by_output += together @ together.T

    def found(self, path: str) -> LayerCurvature:
        for both in self._sums.values():
            if not all(np.isfinite(np.diagonal(sums)).all() for sums in both):
                raise NumericsError(
                    f"the gradient of the prediction with respect to {path} is NaN or infinite; the model overflows"
                )
        alive = {name: Factors(*both) for name, both in self._sums.items() if all(sums.any() for sums in both)}
        return LayerCurvature(self._gram, self._tokens, alive)


def measure(
    adapter: Adapter, probes: Probes, progress: Progress = silent, rows: int = ROWS, seed: int = 0
) -> Curvature:
    """Run a model forward and backward over some of the probes: all of them, or as many as ``rows`` rows and
    ``HELD`` bytes allow, evenly spread.

    Args:
        adapter: The model, in full precision.
        probes: Samples to learn from.
        progress: A bar.
        rows: The most that are differentiated.
        seed: Of the random vectors.

    Raises:
        NumericsError: What is predicted is not finite.
    """
    stages, chain = adapter.stages, Backward(adapter.stages)
    with Passes(adapter, probes.sigmas, exact=True).at(0):
        one = _bytes(chain.forward(probes.states[0])) / len(probes.prompted[0])
    probes = probes.few(min(rows, int(HELD / (2 * one))))
    weights = np.sqrt(adapter.level_weights(probes.sigmas))
    passes = Passes(adapter, probes.sigmas, progress, exact=True)
    entered, left = list[list[State]](), list[list[Slopes]]()
    for batch in passes.indices("gradients"):
        with passes.at(batch):
            inside = chain.forward(probes.states[batch])
            after = stages[-1].run(inside[-1])
            predicted = {key: after[key] for key in written(after, inside[-1])}
            drawn = probes.objective.slopes(predicted, probes.prompted[batch], seed + batch)
            slopes = {key: value * float(weights[batch]) for key, value in drawn.items()}
            behind = [slopes]
            for index in reversed(range(1, len(stages))):
                slopes, _ = chain.backward(index, inside[index], slopes, {})
                mx.eval(slopes)
                behind.append(slopes)
        entered.append(inside)
        left.append(behind[::-1])
    return Curvature(chain, probes.sigmas, probes.sides, entered, left)


def _bytes(states: Sequence[State]) -> int:
    """Of all arrays in states, each counted once."""
    return sum({id(value): value.nbytes for state in states for value in state.values()}.values())
