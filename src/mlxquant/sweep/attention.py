"""Tables for attention probabilities, the one activation of a transformer block that no Linear reads.

Calibration runs a stage as it is, shows the probabilities of its attentions, and puts them on static tables, one entry
a noise level. The result is a simulation (see ``layers.attention``): it tells what such probabilities would cost in
quality, not in time.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..calibration.passes import Passes
from ..errors import NumericsError, RecipeError
from ..layers.attention import QuantizedAttention, ShownAttention, find_quantized_attentions
from ..layers.tree import swapped
from ..methods import registry
from ..models.stages import Stage, State
from ..numerics.arrays import Array
from ..numerics.input_ranges import InputRanges, RunningRanges

VALUES = 2**12  # of the probabilities of a batch, drawn to look at


class SeenProbabilities:
    """What the probabilities of one attention look like at each noise level, as statistics of an input of one
    channel.
    """

    def __init__(self, sides: int) -> None:
        self._sides = sides
        self._levels: dict[float, RunningRanges] = {}
        self._batches = 0

    def pick(self, p: mx.array, opened: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """The largest probability of each sample [B] and VALUES of them, drawn with a seed of their own; p
        [B,heads,N,M]. With a mask only where it is ``opened``: padded tokens are not looked at.
        """
        rng = np.random.default_rng(self._batches)
        self._batches += 1
        places = rng.integers(p.size, size=VALUES) if opened is None else _among(rng, np.array(opened), p.shape)
        return p.reshape(p.shape[0], -1).max(1), p.reshape(-1)[mx.array(places)]

    def add(self, sigma: float, largest: Array, values: Array) -> None:
        """What ``pick`` picked of a batch at one noise level. Probabilities start at 0, whether one is 0 or not."""
        level = self._levels.setdefault(float(np.float32(sigma)), RunningRanges(1))
        largest = largest.reshape(self._sides, -1, 1).max(0)
        level.add(np.zeros_like(largest), largest, values[:, None])

    @property
    def ranges(self) -> InputRanges:
        return InputRanges.of(self._levels)


def _among(rng: np.random.Generator, opened: Array, shape: tuple[int, ...]) -> Array:
    """VALUES places of an array of ``shape``, all equally likely among those where a mask that broadcasts to it is
    true, or of all where it is true nowhere; as flat indices int [VALUES].
    """
    mask = opened.reshape((1,) * (len(shape) - opened.ndim) + opened.shape)
    true = np.argwhere(mask)
    if not len(true):
        return rng.integers(np.prod(shape), size=VALUES)
    picked = true[rng.integers(len(true), size=VALUES)]
    for axis, (have, size) in enumerate(zip(mask.shape, shape, strict=True)):
        if have < size:
            picked[:, axis] = rng.integers(size, size=VALUES)
    return np.ravel_multi_index(tuple(picked.T), shape)


def quantize_probabilities(
    passes: Passes, stage: Stage, inputs: Sequence[State], bits: int, method: str = "dynamic"
) -> dict[str, QuantizedAttention]:
    """Quantized attentions for those of a stage. Nothing is changed: whoever wants them installs them.

    Args:
        passes: The model, over the calibration batches. The stage runs as it is, so that what was quantized in it
            before counts.
        stage: A stage; one without exact attention gives none.
        inputs: What enters it, one state a batch.
        bits: 4, 6 or 8, of each probability.
        method: A registered range method, from 0 to the largest.

    Returns:
        By path.

    Raises:
        RecipeError: The model's attention cannot be opened.
        NumericsError: An attention writes NaN; it names it.
    """
    adapter = passes.adapter
    attentions = adapter.attentions()
    if not attentions and not find_quantized_attentions(adapter.module):
        raise RecipeError(
            f"{adapter.name}: this model's attention cannot be opened; leave its probabilities as they are"
        )
    seen = {path: SeenProbabilities(passes.sides) for path in attentions if stage.owns(path)}
    picked: dict[str, tuple[mx.array, mx.array]] = {}

    def shown(path: str) -> ShownAttention:
        return ShownAttention(lambda *shown: picked.__setitem__(path, seen[path].pick(*shown)))

    for index in passes.indices(f"{stage.name}: probabilities") if seen else ():
        with passes.at(index), swapped(adapter.module, {path: shown(path) for path in seen}):
            mx.eval(stage.run(inputs[index]), picked)
        for path, (largest, values) in picked.items():
            if not np.isfinite(top := np.array(largest)).all():
                raise NumericsError(
                    f"the attention {path} writes NaN probabilities; the model or what enters it is damaged"
                )
            seen[path].add(passes.sigmas[index], top, np.array(values))
        picked.clear()
    find = registry.get("range", method).function
    tables = {path: find(probabilities.ranges, np.ones((1, 1)), bits) for path, probabilities in seen.items()}
    return {path: QuantizedAttention(table, adapter.clock) for path, table in tables.items()}
