"""A model that learned quantized as one of integer layers: the codes that it was trained through, packed, so that sizes
are real.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..grids.weights import Grid, WeightFormat
from ..layers.embeddings import QuantizedEmbedding
from ..layers.linear import QuantizedLinear
from ..layers.own import OwnModule
from ..layers.tree import set_module
from ..methods.fake_quantizers import Coded
from ..models.gpt.network import GPT
from .convert import kept_activations
from .modules import QuantizingEmbedding, QuantizingLinear, QuantizingWeight
from .options import PROJECTIONS


class RowParts(OwnModule):
    """Linears that read the same input and write one output after the other: a matrix whose rows are not all on one
    kind of grid.
    """

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.parts = list(parts)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([part(x) for part in self.parts], axis=-1)


def quantizing_weights(model: nn.Module) -> dict[str, QuantizingWeight]:
    """Every layer whose weight is rounded, by path."""
    return {path: module for path, module in sorted(model.named_modules()) if isinstance(module, QuantizingWeight)}


def to_integer_layers(model: GPT) -> GPT:
    """Put integer layers in the place of those that the model was trained through, in place; points at which
    activations are rounded stay.

    The weights are bit for bit those that the model computes with after training. Where rows of a matrix have different
    bits, or some of them none, a ``RowParts`` holds a layer for each.
    """
    for path, layer in quantizing_weights(model).items():
        coded = layer.coded()
        if isinstance(layer, QuantizingEmbedding):
            assert coded[0] is not None
            set_module(model, path, QuantizedEmbedding(*_codes_and_grid([coded[0]])))
        elif isinstance(layer, QuantizingLinear):
            set_module(model, path, _integer_linear(layer, coded))
    return model


def _integer_linear(layer: QuantizingLinear, coded: Sequence[Coded | None]) -> nn.Module:
    bias = layer.bias if "bias" in layer else None
    known = [part for part in coded if part is not None]
    if len(known) == len(coded) and len({part.bits for part in known}) == 1:
        return QuantizedLinear(*_codes_and_grid(known), bias)
    biases = [None] * len(coded) if bias is None else mx.split(bias, len(coded))
    parts = [
        _plain_linear(weight, own) if part is None else QuantizedLinear(*_codes_and_grid([part]), own)
        for part, weight, own in zip(coded, layer.parts(), biases, strict=True)
    ]
    return RowParts(parts)


def _plain_linear(weight: mx.array, bias: mx.array | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_weights([("weight", weight)] + ([] if bias is None else [("bias", bias)]))
    return linear


def _codes_and_grid(parts: Sequence[Coded]) -> tuple[np.ndarray, Grid]:
    """Codes uint8 [out,in] of parts with the same bits, one below the other, and the grid they share."""
    codes = np.concatenate([np.array(part.codes).astype(np.uint8) for part in parts])
    scales, biases = (
        np.concatenate(
            [
                np.broadcast_to(np.array(values), (part.codes.shape[0], 1))
                for part, values in zip(parts, pair, strict=True)
            ]
        )
        for pair in ([part.scale for part in parts], [part.bias for part in parts])
    )
    zero = 2 ** (parts[0].bits - 1)
    one = len(parts) == 1 and parts[0].scale.size == 1
    format = WeightFormat(
        parts[0].bits, "tensor" if one else "channel", symmetric=bool((biases == -zero * scales).all())
    )
    return codes, Grid(format, scales, biases)


def quantized_values(model: GPT) -> dict[str, mx.array]:
    """What is stored of a model that learned quantized, by name: of each weight and each kept activation ``codes``
    int8, ``bits``, and ``scale`` and ``zero_point`` float32 that broadcast against the codes: ``value = scale * (codes
    - zero_point)``.

    The rows of q, k and v come apart, under their own names.
    """
    values: dict[str, mx.array] = {}
    for path, layer in quantizing_weights(model).items():
        for name, coded in zip(part_names(path, layer), layer.coded(), strict=True):
            if coded is not None:
                values |= {f"{name}.{kind}": value for kind, value in coded.stored.items()}
    return values | kept_activations(model)


def part_names(path: str, layer: QuantizingWeight) -> list[str]:
    """The name of each part of a weight: its path, and, where there are several, their projections'."""
    count = len(layer.quantizers)
    if count == 1:
        return [path]
    own = {part.part: name for name, part in PROJECTIONS.items() if path.endswith(part.path) and part.parts == count}
    return [f"{path}.{own[number]}" for number in range(count)]
