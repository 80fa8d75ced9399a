"""Temporal Dynamic Quantization (arXiv 2306.02316): steps as a trained network's smooth function of time.

The network (``grids.time_network``) is trained for each layer, by AdamW, on the error that quantizing the layer's input
leaves in the layer's output, ``‖(Q(x) - x) Wᵀ‖²`` over the sampled rows x; gradients go straight through the rounding.
``tdq`` reads the timestep, as published; ``logsnr``, the same over the log-SNR, is no paper's. ``time_ridge`` has both
without training.

Departures from the paper. Our grids are affine, so there is a second output, for the shift. It trains for a loss at the
end of the model; a method sees one layer, so it is that layer's output that counts, all noise levels alike, each in
units of the error that the extremes leave there. The start is the closed form of ``time_ridge`` in place of one step
for all times, and what is kept is the best of what was looked at, the start among it. One hidden layer, no dropout.
The sampled rows hold hardly any of the largest values, so each channel's extremes count as well, as in
``clipping.error``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ...grids.reading import Entry, represented
from ...grids.tables import ActivationTable
from ...grids.time_network import BIAS, TIMES, Layer, TimeNetwork, fourier_features
from ...numerics.arrays import Array
from ...numerics.input_ranges import InputRanges
from ..registry import register
from .clipping import EXTREMES, error, extremes
from .time_ridge import TDQ, fitted

ITERATIONS = 300
LOOK = 50  # iterations between two looks at all rows
LEARNING_RATE = 0.003  # at the start; it falls to 0 along a cosine
VALUES = 2**16  # of a minibatch, about
OUTPUTS_SEEN = 64  # of a layer; where it has more, so many random sums of them


class LayerError:
    """The error in a layer's output for steps and shifts [T] of its input, in units of what ``extremes`` leaves at each
    noise level: [T] float32, and 0 where that leaves nothing.

    Inputs are in ``unit``, a power of two near the step, so that scaled inputs have the same errors bit for bit.
    """

    def __init__(self, ranges: InputRanges, weight: Array, bits: int, unit: float, rng: np.random.Generator):
        widest = extremes(ranges, weight, bits)
        self.rows = mx.array(ranges.rows / unit, mx.float32)
        self._rare = mx.array(np.stack([ranges.least, ranges.most], 1) / unit, mx.float32)
        self._heft = mx.array(np.square(weight, dtype=np.float64).sum(0) * EXTREMES / len(ranges.rows[0]), mx.float32)
        if len(weight) > OUTPUTS_SEEN:  # sums with random signs: the same error in expectation
            signs = rng.choice([-1.0, 1.0], size=(OUTPUTS_SEEN, len(weight)))
            weight = signs @ weight / np.sqrt(OUTPUTS_SEEN)
        self._weight = mx.array(weight.T, mx.float32)
        self._entry = Entry.of(widest, ranges.sigma).shaped(3)
        base = self._error(mx.array(widest.step / unit), mx.array(widest.shift[:, 0] / unit), self.rows)
        self._scale = mx.where(base > 0, 1 / base, 0)

    def __call__(self, step: mx.array, shift: mx.array, rows: mx.array) -> mx.array:
        return self._error(step, shift, rows) * self._scale

    def _error(self, step: mx.array, shift: mx.array, rows: mx.array) -> mx.array:
        entry = replace(self._entry, step=step[:, None, None], shift=shift[:, None, None])
        wrong, clipped = represented(rows, entry) - rows, represented(self._rare, entry) - self._rare
        return mx.square(wrong @ self._weight).sum(-1).mean(1) + (mx.square(clipped) * self._heft).sum((1, 2))


class Perceptron(nn.Module):
    """The layers of a network, to be trained. Nothing is drawn for them, so the host's random numbers stay."""

    def __init__(self, network: TimeNetwork):
        super().__init__()
        self.weights = [mx.array(weight) for weight, _ in network.layers]
        self.biases = [mx.array(bias) for _, bias in network.layers]

    def __call__(self, features: mx.array) -> mx.array:
        values = features @ self.weights[0] + self.biases[0]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            values = nn.relu(values) @ weight + bias
        return values

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its numbers as they are now."""
        return tuple((np.array(w), np.array(b)) for w, b in zip(self.weights, self.biases, strict=True))


def trained(
    start: TimeNetwork, ranges: InputRanges, weight: Array, bits: int, iterations: int = ITERATIONS, seed: int = 0
) -> TimeNetwork:
    """A network trained on the error of a layer's output.

    Args:
        start: Where training starts; its Δ₀ and s₀ stay.
        ranges: Of the layer's input, with sampled rows.
        weight: [out,in].
        bits: Of the input.
        iterations: Minibatches, each of a few rows of every noise level.
        seed: Of the minibatches and of the sums of outputs.

    Returns:
        The network with the least error on all rows, of those that were looked at every ``LOOK`` iterations.
    """
    rng = np.random.default_rng(seed)
    unit = float(2.0 ** np.rint(np.log2(start.step)))
    error_of = LayerError(ranges, weight, bits, unit, rng)
    features = mx.array(fourier_features(TIMES[start.time](ranges.sigma)), mx.float32)
    model = Perceptron(start)
    delta, middle = start.step / unit, start.shift / unit

    def loss(rows: mx.array) -> mx.array:
        out = model(features)
        return error_of(delta * nn.softplus(BIAS + out[:, 0]), middle + delta * out[:, 1], rows).mean()

    best, least = start, float(np.array(loss(error_of.rows)))
    levels, count, width = ranges.rows.shape
    some = min(count, max(1, VALUES // (levels * width)))
    optimizer = optim.AdamW(optim.cosine_decay(LEARNING_RATE, max(1, iterations)))
    step = nn.value_and_grad(model, loss)
    for iteration in range(iterations):
        _, gradients = step(error_of.rows[:, mx.array(rng.choice(count, some, replace=False))])
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
        if (iteration + 1) % LOOK == 0 and (now := float(np.array(loss(error_of.rows)))) < least:
            best, least = replace(start, layers=model.layers), now
    return best


def network_table(time: str, ranges: InputRanges, weight: Array, bits: int) -> ActivationTable:
    """The table of a trained network over ``time``."""
    start = fitted(time, error(ranges, weight, bits))
    return ActivationTable.of_network(trained(start, ranges, weight, bits, ITERATIONS), ranges.sigma, bits)


network = partial(register, "range", citation=TDQ, over_time=True)


@network("tdq", summary="a network over the timestep, trained on the error of the layer's output")
def tdq(ranges: InputRanges, weight: Array, bits: int) -> ActivationTable:
    """Temporal Dynamic Quantization (arXiv 2306.02316) on the timestep t."""
    return network_table("timestep", ranges, weight, bits)


@network("logsnr", summary="a network over the log-SNR, trained on the error of the layer's output")
def logsnr(ranges: InputRanges, weight: Array, bits: int) -> ActivationTable:
    """The same on the log-SNR λ(sigma) = 2 ln((1 - sigma) / sigma), which moves most where the image settles, near 0
    and 1.
    """
    return network_table("log-snr", ranges, weight, bits)
