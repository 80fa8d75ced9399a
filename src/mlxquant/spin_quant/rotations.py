"""Fold rotations of a language model's hidden states into its weights (QuaRot, arXiv 2404.00456; SpinQuant,
2405.16406).

R1 [D,D] rotates the residual stream, x R1: what reads it gets W R1, what writes it R1ᵀ W. R2 [heads,d,d] rotates the
values of each head between the layer that writes and the one that reads them. Both fold, and the function stays the
same. Norms keep their place: their gains go into their readers, and a LayerNorm asks for R1 1 = 1
(``numerics.cayley``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..layers.tree import get_module, set_module
from ..models.turned_norm import TurnedNorm
from ..numerics import cayley
from .held_heads import HeldHeads
from .plain_layers import plain
from .residual_stream import ResidualStream, Values, residual_stream, untie

Rotations = dict[str, Any]  # "residual" [D,D] and "values", a list of [heads,size,size] by layer; of NumPy or MLX


@dataclass(frozen=True)
class LinearMap:
    """What a linear layer does: weight [out,in] and bias [out], float32."""

    weight: mx.array
    bias: mx.array | None

    @classmethod
    def of(cls, layer: Any) -> LinearMap:
        return cls(layer.weight.astype(mx.float32), layer.bias.astype(mx.float32) if "bias" in layer else None)

    def store(self, layer: nn.Linear) -> None:
        """Into a layer, in the dtype of its weight."""
        dtype = layer.weight.dtype
        layer.weight = self.weight.astype(dtype)
        if self.bias is not None:
            layer.bias = self.bias.astype(dtype)


def start(stream: ResidualStream, kind: str, seed: int) -> Rotations:
    """Rotations to start from.

    Args:
        stream: Where the model writes and reads its residual stream.
        kind: "hadamard", "random" or "identity", one of ``cayley.STARTS``.
        seed: Of signs and random matrices.

    Returns:
        NumPy float64.
    """
    rng = np.random.default_rng(seed)
    residual = cayley.start(kind, stream.width, stream.centred, rng)
    values = [np.stack([cayley.start(kind, v.size, False, rng) for _ in range(v.heads)]) for v in stream.values]
    return {"residual": residual, "values": values}


def folded(model: nn.Module, stream: ResidualStream) -> dict[str, LinearMap]:
    """Every linear of the blocks as if the norms before it had no gain and no bias, and, behind norms that subtract the
    mean, what is written had none. The function is the same; the model is not changed.
    """
    norms, linears = stream.readers, {}
    for path in stream.linears:
        linear = LinearMap.of(plain(get_module(model, path)))
        if path in norms:
            linear = _behind(get_module(model, norms[path]), linear)
        if stream.centred and path in stream.writers:
            weight, bias = linear.weight, linear.bias
            linear = LinearMap(
                weight - weight.mean(axis=0, keepdims=True), None if bias is None else bias - bias.mean()
            )
        linears[path] = linear
    return linears


def _behind(norm: Any, linear: LinearMap) -> LinearMap:
    """What a linear becomes when the norm before it gives its gain and bias to it."""
    weight, bias = linear.weight, linear.bias
    if "bias" in norm:
        added = weight @ norm.bias.astype(mx.float32)
        bias = added if bias is None else bias + added
    return LinearMap(weight * norm.weight.astype(mx.float32), bias)


class Turn:
    """How rotations change each linear of a model."""

    def __init__(self, stream: ResidualStream):
        self._stream, self._reads = stream, set(stream.readers)
        self._written = {values.writer: (at, values) for at, values in enumerate(stream.values)}
        self._read = {values.reader: (at, values) for at, values in enumerate(stream.values)}

    def __call__(self, path: str, linear: LinearMap, rotations: Rotations) -> LinearMap:
        """The linear at ``path`` on rotated inputs, with rotated outputs. MLX can differentiate it."""
        weight, bias = linear.weight, linear.bias
        if path in self._reads:
            weight = weight @ rotations["residual"]
        if path in self._read:
            at, values = self._read[path]
            weight = _read_values(weight, values, rotations["values"][at])
        if path in self._stream.writers:
            weight = rotations["residual"].T @ weight
            bias = None if bias is None else bias @ rotations["residual"]
        if path in self._written:
            at, values = self._written[path]
            weight = _write_values(weight, values, rotations["values"][at])
            bias = None if bias is None else _write_values(bias[:, None], values, rotations["values"][at])[:, 0]
        return LinearMap(weight, bias)


def _write_values(weight: mx.array, values: Values, rotation: mx.array) -> mx.array:
    """R2ᵀ times the rows of a weight [out,n] that write values, head by head."""
    stop = values.first + values.heads * values.size
    mine = weight[values.first : stop].reshape(values.heads, values.size, -1)
    turned = (rotation.swapaxes(-1, -2) @ mine).reshape(stop - values.first, -1)
    return mx.concatenate([weight[: values.first], turned, weight[stop:]])


def _read_values(weight: mx.array, values: Values, rotation: mx.array) -> mx.array:
    """The columns of a weight [out,in] that read values, times R2, head by head."""
    rotation = mx.repeat(rotation, values.repeats, axis=0)
    mine = weight.reshape(weight.shape[0], -1, values.size).swapaxes(0, 1)
    return (mine @ rotation).swapaxes(0, 1).reshape(weight.shape)


def hold_heads(model: nn.Module, stream: ResidualStream, bits: int) -> dict[str, nn.Module]:
    """What to put where so that keys and values are rounded, keys after R3. Where queries and keys share a module,
    queries are rounded, too.

    Args:
        model: The model; it is not changed.
        stream: Its description.
        bits: Of each number; every head of a token has a scale of its own.

    Returns:
        Modules by the path that they belong at.
    """
    size = stream.values[0].size
    modules: dict[str, nn.Module] = {
        path: HeldHeads(get_module(model, path), size, None, turned=True) for path in stream.queries
    }
    modules |= {path: HeldHeads(get_module(model, path), size, bits, turned=True) for path in stream.keys}
    return modules | {path: HeldHeads(get_module(model, path), size, bits, turned=False) for path in stream.held}


def rotate(model: nn.Module, rotations: Rotations) -> bool:
    """Fold rotations into a model, in place and in its dtypes. The function stays the same, up to their roundings.

    Args:
        model: Of a family in ``residual_stream.FAMILIES``, not rotated yet. Layers that are rounded already become
            plain ones with the weights that they multiply by.
        rotations: Of its residual stream and its values.

    Returns:
        Whether stock code still loads it, with ``tie_word_embeddings: false`` where its output was tied. A model that
        can only be tied, GPT-2, has a ``TurnedNorm`` afterwards; stock code has no place for its rotation.
    """
    for path in residual_stream(model).layers:
        if (layer := plain(get_module(model, path))) is not None:  # it is one: the description says so
            set_module(model, path, layer)
    untie(model)  # first: an embedding that is the output layer as well cannot be rotated for both
    stream = residual_stream(model)
    turn, residual = Turn(stream), rotations["residual"]
    # Linears before norms: what folds into a linear are the gains and biases that its norm still has.
    for path, linear in folded(model, stream).items():
        turn(path, linear, rotations).store(get_module(model, path))
    for path in stream.norms:
        _make_plain(get_module(model, path))
    final = get_module(model, stream.final)
    if stream.output is None:
        set_module(model, stream.final, TurnedNorm(final, residual))
    else:
        output = get_module(model, stream.output)
        read = _behind(final, LinearMap.of(output))
        LinearMap(read.weight @ residual, read.bias).store(output)
        _make_plain(final)
    for path in stream.embeddings:
        embedding = get_module(model, path)
        table = embedding.weight.astype(mx.float32)
        if stream.centred and (path != stream.tokens or stream.output is not None):
            table = table - table.mean(axis=-1, keepdims=True)
        embedding.weight = (table @ residual).astype(embedding.weight.dtype)
    mx.eval(model.parameters())
    return stream.output is not None


def _make_plain(norm: Any) -> None:
    """Take gain and bias away from a norm, in place."""
    norm.weight = mx.ones_like(norm.weight)
    if "bias" in norm:
        norm.bias = mx.zeros_like(norm.bias)
