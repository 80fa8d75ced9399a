"""Learn the codes of a stage's layers together, by gradients of the error in what the whole stage writes.

The stage runs with soft weights in the places of its layers and with a straight-through estimator wherever activations
are rounded, so that the error reaches the layers before: query, key, value and the first MLP layer. Minibatches mix
timesteps; every sample brings its own conditioning, its own activation scales and its own targets. Everything runs in
float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..calibration.passes import Passes
from ..errors import AdapterError
from ..grids.reading import Entry, TokenReader, represented
from ..layers.embeddings import QuantizedEmbedding
from ..layers.product import QuantizedProduct
from ..layers.tree import StandIn, swapped
from ..methods import registry
from ..methods.weights.adaround import Checkpoint, Choice, Settings, choose
from ..models.stages import Stage, State
from ..numerics.arrays import Array
from ..progress import Progress, silent
from .layer import Rounded
from .store import Layers
from .streams import ChannelCosts, Teacher


@dataclass
class Minibatch:
    """What the soft layers need to know of the running minibatch: each sample's noise level, and a key for QDrop."""

    level: mx.array | None = None
    key: mx.array | None = None


class SoftLayer(StandIn):
    """A quantized layer with an integer weight [rows, in] that is set from outside, its activations quantized with a
    straight-through estimator.

    ``levels`` [T] are the noise levels of the calibration; ``minibatch.level`` [B] holds indices into them.
    """

    def __init__(self, layer: QuantizedProduct, levels: Array, minibatch: Minibatch, drop: float, salt: int):
        super().__init__(layer)
        self["weight"] = layer.matrix()  # not the one of the layer that it stands in for
        self._minibatch, self._drop, self._salt = minibatch, drop, salt
        self._entries = None if layer.table is None else Entry.of(layer.table, levels)
        self._tokens = layer.reader if isinstance(layer.reader, TokenReader) else None

    def __call__(self, x: mx.array, *where: Any, **named: Any) -> mx.array:
        layer, call = self._layer, self._layer.arguments(*where, **named)
        if isinstance(layer, QuantizedEmbedding):
            return layer.looked_up(x, self.weight)
        x = layer.transformed(x)
        y = layer.product(self._quantized(x), self.weight, *call)
        return cast(mx.array, layer.with_bias(layer.add_branch(y, x, *call), *call))

    def _quantized(self, x: mx.array) -> mx.array:
        if self._tokens is not None:
            entries = self._tokens.read(x)
        elif self._entries is not None:
            assert self._minibatch.level is not None
            entries = self._entries.rows(self._levels_of(x, self._minibatch.level)).shaped(x.ndim)
        else:
            return x
        q = represented(x, entries)
        if self._drop and self._minibatch.key is not None:
            key = mx.random.split(self._minibatch.key, self._salt + 1)[self._salt]
            q = mx.where(mx.random.bernoulli(self._drop, x.shape, key), x, q)
        return q

    def _levels_of(self, x: mx.array, level: mx.array) -> mx.array:
        """The noise level of each of an input's rows, which are samples, or the tokens of all of them."""
        if x.shape[0] == level.shape[0] or level.shape[0] == 1:
            return level
        if not mx.all(level == level[0]).item():
            raise AdapterError(
                "a layer sorts the tokens of samples at different noise levels, and none can be told from another any"
                " more; learn its codes with --override '@mlp=...' and no 'adaround', or at one noise level"
            )
        return level[:1]


def _float32(value: mx.array) -> mx.array:
    """Floating-point arrays in float32, others (indices) as they are."""
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value


def _float32_state(state: State) -> State:
    return {key: _float32(value) for key, value in state.items()}


class Reconstruction:
    """A stage with soft weights for some of its layers, ready to be differentiated. ``batch`` samples at once, as many
    as ``adapter.rows`` allows.
    """

    def __init__(
        self,
        passes: Passes,
        stage: Stage,
        layers: Layers,
        goals: Mapping[str, Rounded],
        inputs: Sequence[State],
        teacher: Teacher,
        wanted: Sequence[State],
        settings: Settings,
        costs: ChannelCosts | None = None,
    ):
        """Put nothing in place yet; ``installed`` does.

        Args:
            passes: The model, over the calibration batches.
            stage: The stage that is learned.
            layers: All its quantized layers. Those that are no goals run as they are, with unquantized inputs where
                they have no table.
            goals: The layers to learn, each towards its target weight.
            inputs: What enters the stage, one state a batch.
            teacher: Picks of what the stage writes what there are targets for.
            wanted: What it should write, one state a batch.
            settings: Of the optimiser.
            costs: What errors in each written channel cost; None counts tensors alike.
        """
        self._adapter, self._stage, self._teacher, self._settings = passes.adapter, stage, teacher, settings
        self._minibatch = Minibatch()
        sigmas = np.array(passes.sigmas, np.float32)
        levels = np.unique(sigmas)
        self._soft = {
            path: SoftLayer(layer, levels, self._minibatch, settings.drop, salt)
            for salt, (path, layer) in enumerate(layers.items())
        }
        self.grids = {path: rounded.layer.grid() for path, rounded in goals.items()}
        self._goals = goals
        mx.eval([layer.weight for layer in self._soft.values()])
        rows = [self._adapter.rows_in(state) for state in wanted]
        self._level = mx.array(np.repeat(np.searchsorted(levels, sigmas), rows))
        self._inputs, self._wanted = inputs, wanted
        self._places = [(batch, row) for batch, count in enumerate(rows) for row in range(count)]
        self.batch = min(settings.batch, passes.adapter.rows, len(self._places))
        self._costs = (
            None if costs is None else {k: mx.array(np.repeat(w, rows, 0).astype(np.float32)) for k, w in costs.items()}
        )
        self._scale: dict[str, float] = {}

    def choices(self, nearest: bool) -> dict[str, Choice]:
        """What every weight chooses between, starting from the layers' codes, or with ``nearest`` from the weight
        itself.
        """
        return {
            path: choose(rounded.target, self.grids[path], None if nearest else rounded.codes, self._settings.trust)
            for path, rounded in self._goals.items()
        }

    def normalise(self, errors: Mapping[str, float]) -> None:
        """Measure the loss in units of the error that the start of the search has, ``Deviation.by_tensor``.

        Without costs each written tensor counts as its adapter says; with them, as far as it changes the velocity.
        """
        if self._costs is not None:
            self._scale = dict.fromkeys(errors, max(sum(errors.values()), 1e-30))
            return
        weights = self._adapter.weights(self._stage, errors)
        whole = sum(weights.values())
        self._scale = {
            key: max(error, 1e-30) * (whole / weights[key] if weights[key] else inf) for key, error in errors.items()
        }

    def _error(self, key: str, output: mx.array, wanted: mx.array, rows: mx.array) -> mx.array:
        """The squared error of a tensor [B,...,D], averaged, or weighted, averaged over tokens and summed over
        channels.
        """
        squared = mx.square(output - wanted)
        if self._costs is None:
            return squared.mean()
        return (
            (squared.reshape(squared.shape[0], -1, squared.shape[-1]).mean(1) * self._costs[key][rows]).sum(-1).mean()
        )

    def minibatch(self, iteration: int) -> tuple[Any, ...]:
        """Inputs, targets, indices of the samples and a random key of an iteration: a function of the seed and the
        iteration alone.
        """
        random = np.random.default_rng([self._settings.seed, iteration])
        rows = random.choice(len(self._places), self.batch, replace=False)
        return *self.samples(rows), mx.array(rows), mx.random.key(int(random.integers(2**31)))

    def samples(self, rows: Iterable[int]) -> tuple[State, State]:
        """Inputs and targets of some samples, counted over all batches, in float32."""
        places = [self._places[row] for row in rows]
        return self._joined(self._inputs, places), self._joined(self._wanted, places)

    def _joined(self, states: Sequence[State], places: Sequence[tuple[int, int]]) -> State:
        """Single rows of states as one state in float32."""
        rows = [self._adapter.take(states[batch], slice(row, row + 1)) for batch, row in places]
        return self._adapter.joined([_float32_state(row) for row in rows])

    def loss(
        self, weights: dict[str, mx.array], inputs: State, wanted: State, rows: mx.array, key: mx.array
    ) -> mx.array:
        """Error of what the stage writes for some samples ``rows`` [B], in units of the start's."""
        self._minibatch.level, self._minibatch.key = self._level[rows], key
        for path, weight in weights.items():
            self._soft[path].weight = weight
        outputs = self._teacher.pick(self._stage.run(inputs))
        total = mx.array(0.0)
        for name, target in wanted.items():
            total = total + self._error(name, outputs[name], target, rows) / self._scale[name]
        return total

    @contextmanager
    def installed(self) -> Iterator[None]:
        """With the soft layers in the places of the stage's own; those return afterwards, also after an exception."""
        with swapped(self._adapter.module, dict(self._soft)):
            yield


def reconstruct_stage(
    method: str,
    work: Reconstruction,
    start: Mapping[str, float],
    nearest: bool,
    checkpoint: Checkpoint | None,
    settings: Settings,
    progress: Progress = silent,
    label: str = "",
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Learn the codes of a stage by a registered method: codes uint8 [out,in] by path, and facts about the run.

    ``start`` is the error of what the stage writes with its hard-rounded start, by tensor; ``nearest`` starts from the
    weights instead of from those codes.
    """
    work.normalise(start)
    learn = registry.get("reconstruct", method).function
    with work.installed():
        learned = learn(
            work.loss, work.choices(nearest), work.grids, work.minibatch, settings, checkpoint, progress, label
        )
    return learned.codes, {**learned.facts, "batch": work.batch}
