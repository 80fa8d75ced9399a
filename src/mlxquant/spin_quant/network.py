"""The network that SpinQuant learns on: a language model whose weights and inputs are rotated and then rounded, in
each forward pass, as they would be in the end.

What is sought are rotations that make rounding harmless, so the loss must be a function of the rotations, with the
rounding inside. Stand-ins at the paths of the model's own layers rotate the full-precision weights, round them, and
round what they are given; roundings let the gradient pass straight through, and scales follow the extremes. Nothing is
stored rounded here, and nothing of the model is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..grids.reading import TokenReader, represented, round_through
from ..grids.weights import WeightFormat
from ..layers.tree import get_module, swapped
from ..numerics.hadamard import block_size, rotated_blocks
from .residual_stream import ResidualStream
from .rotations import Rotations, Turn, folded, hold_heads


@dataclass(frozen=True)
class Precision:
    """What is rounded, and how; None leaves it as it is. With quantized activations the MLP's hidden state is rotated
    online before its last layer (R4).

    Attributes:
        weight: The format of every linear of the blocks.
        activation: Bits of their inputs, each token on its own scale.
        held: Bits of keys and values, each head of a token on its own scale.
    """

    weight: WeightFormat | None
    activation: int | None
    held: int | None = None

    def block(self, stream: ResidualStream, path: str, width: int) -> int:
        """In blocks of how many channels the input of a layer is rotated while it runs."""
        return block_size(width) if self.activation is not None and path in stream.inner else 1


def rounded_weight(weight: mx.array, format: WeightFormat) -> mx.array:
    """A weight [out,in] on the grid that spans its extremes: ``grids.weights.fit_extremes`` as a part of MLX's graph,
    but for the rounding of scales.
    """
    columns = format.columns(weight.shape[1])
    groups = weight.reshape(1, 1, -1) if format.group == "tensor" else weight.reshape(weight.shape[0], -1, columns)
    if format.symmetric:
        peak = mx.abs(groups).max(-1, keepdims=True)
        scales, biases = peak / (format.zero_code - 1), mx.zeros_like(peak)
        low, high = -format.zero_code, format.zero_code - 1
    else:
        biases = mx.minimum(groups.min(-1, keepdims=True), 0)
        scales = (mx.maximum(groups.max(-1, keepdims=True), 0) - biases) / (format.levels - 1)
        low, high = 0, format.levels - 1
    scales = mx.where(scales > 0, scales, 1.0)
    codes = mx.clip(cast(mx.array, round_through((groups - biases) / scales)), low, high)
    return (codes * scales + biases).reshape(weight.shape)


class SpinNetwork:
    """``at(rotations)`` puts the rounded, rotated layers into the model; inside, the model is that network."""

    def __init__(self, model: nn.Module, stream: ResidualStream, precision: Precision):
        self._model, self._precision = model, precision
        self._turn, self._linears = Turn(stream), folded(model, stream)
        self._blocks = {
            path: precision.block(stream, path, linear.weight.shape[1]) for path, linear in self._linears.items()
        }
        self._reader = None if precision.activation is None else TokenReader(precision.activation)
        self.rotations: Rotations = {}
        self._layers: dict[str, nn.Module] = {path: _SpinLinear(self, path) for path in self._linears}
        self._layers |= {path: _plain_norm(get_module(model, path)) for path in stream.norms}
        self._layers |= {path: _SpinEmbedding(self, get_module(model, path)) for path in stream.embeddings}
        self._layers[stream.final] = _TurnedBack(self, get_module(model, stream.final))
        self._stream = stream

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model is the network inside."""
        with swapped(self._model, self._layers):
            held = {} if self._precision.held is None else hold_heads(self._model, self._stream, self._precision.held)
            with swapped(self._model, held):
                yield

    def loss(self, rotations: Rotations, tokens: mx.array) -> mx.array:
        """Mean cross-entropy of the next token; only while the network is ``installed``.

        Args:
            rotations: Of MLX, what is differentiated by.
            tokens: int32 [B,T].

        Returns:
            Nats a token, float32 [].
        """
        self.rotations = rotations
        logits = self._model(tokens[:, :-1])
        return nn.losses.cross_entropy(logits.astype(mx.float32), tokens[:, 1:], reduction="mean")

    def linear(self, path: str, x: mx.array) -> mx.array:
        """x [...,in] through the layer at ``path``, rotated and rounded."""
        turned = self._turn(path, self._linears[path], self.rotations)
        weight, x32 = turned.weight, x.astype(mx.float32)
        if (block := self._blocks[path]) > 1:
            weight, x32 = rotated_blocks(weight, block), rotated_blocks(x32, block)
        if self._reader is not None:
            x32 = represented(x32, self._reader.read(x32))
        if self._precision.weight is not None:
            weight = rounded_weight(weight, self._precision.weight)
        y = x32 @ weight.T
        return (y if turned.bias is None else y + turned.bias).astype(x.dtype)


class _SpinLinear(nn.Module):
    def __init__(self, network: SpinNetwork, path: str):
        super().__init__()
        self._network, self._path = network, path

    def __call__(self, x: mx.array) -> mx.array:
        return self._network.linear(self._path, x)


class _SpinEmbedding(nn.Module):
    """Writes into the rotated stream; as the last layer it is what it was."""

    def __init__(self, network: SpinNetwork, embedding: Any):
        super().__init__()
        self._network, self._embedding = network, embedding

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self._embedding(tokens)
        return (x.astype(mx.float32) @ self._network.rotations["residual"]).astype(x.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._embedding.as_linear(x)


class _TurnedBack(nn.Module):
    """The last norm, of the stream as it was: from there on nothing is rounded."""

    def __init__(self, network: SpinNetwork, norm: nn.Module):
        super().__init__()
        self._network, self._norm = network, norm

    def __call__(self, x: mx.array) -> mx.array:
        return self._norm((x.astype(mx.float32) @ self._network.rotations["residual"].T).astype(x.dtype))


def _plain_norm(norm: Any) -> nn.Module:
    """The norm without gain and bias."""
    width = norm.weight.shape[0]
    return (
        nn.LayerNorm(width, norm.eps, affine=False) if isinstance(norm, nn.LayerNorm) else nn.RMSNorm(width, norm.eps)
    )
