"""How large things are: a weight before it is quantized, a quantized model, a module before and after.

What a layer really stores it says itself (``QuantizedLayer.nbytes``); ``planned_bytes`` is the same number before there
is a layer, and a test holds the two together. All figures in bits per weight divide stored bits by the numbers that
what is stored stands for (``numbers_in``): a quantized weight's own, however many codes, scales and branches stand for
them, and never what says how an input is quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..grids.weights import WeightFormat, fit_extremes
from ..recipes.recipe import LayerSpec
from .kinds import known_kind
from .names import BIAS, DIVISOR, FOR_INPUT, SCALES, WEIGHT
from .packed import QuantizedLayer
from .tree import parameters, starred


class Sized(Protocol):
    """An array, wherever it is."""

    @property
    def size(self) -> int: ...


def planned_bytes(spec: LayerSpec | WeightFormat, shape: Sequence[int], scale_bytes: int = 2, parts: int = 1) -> int:
    """Bytes that a layer will store for a weight of so many rows and columns, in ``parts``: codes in whole words a row,
    scales of ``scale_bytes``, biases, the branch.

    What a transform may add, at most one number for each input, is not known beforehand, nor is a branch that float16
    cannot hold. Raises RecipeError where groups do not divide the width.
    """
    rows, width = shape[0], prod(shape[1:])
    format = spec if isinstance(spec, WeightFormat) else spec.weight
    rank = 0 if isinstance(spec, WeightFormat) or spec.branch is None else min(spec.rank, rows // parts, width)
    words = rows * -(-width * format.bits // 32)
    scales = 1 if format.group == "tensor" else rows * (width // format.columns(width))
    factors = rank * (rows + parts * width)
    return 4 * words + scales * scale_bytes * (1 if format.symmetric else 2) + 2 * factors


def scale_bytes(format: WeightFormat, weight: mx.array) -> int:
    """Those of a scale, or a bias, of a weight [rows, in] in a format: 2, or 4 where float16 is too small for its
    extremes. A search for narrower steps, or a transform, may end on the other side of that border.

    Raises NumericsError on NaN or infinite weights, RecipeError where groups do not divide the width.
    """
    values = np.array(weight.astype(mx.float32)).reshape(weight.shape[0], -1)
    return np.dtype(fit_extremes(values, format).dtype).itemsize


def planned_layer_bytes(spec: LayerSpec, layer: nn.Module) -> int:
    """``planned_bytes`` of a layer in full precision."""
    kind = known_kind(layer)
    each = scale_bytes(spec.weight, kind.form.matrix_of(layer))
    return planned_bytes(spec, kind.shape(layer), each, kind.parts(layer))


def planned_bits_per_weight(plan: Mapping[str, LayerSpec], layers: Mapping[str, nn.Module]) -> float:
    """What a plan's own formats take by weight of the ``layers`` in it, which are in full precision."""
    stored = sum(planned_layer_bytes(spec, layers[path]) for path, spec in plan.items())
    return 8 * stored / sum(layers[path].weight.size for path in plan)


def numbers_in(named: Iterable[tuple[str, Sized]], weights: Mapping[str, int]) -> int:
    """For how many numbers arrays stand, which are given with their full names.

    ``weights`` are the numbers in the weights of quantized layers, by path. All else that such a layer has stands for
    none, but its bias; and so does what says how an input is quantized, wherever it is.
    """
    total = 0
    for name, value in named:
        path, _, own = name.rpartition(".")
        if path in weights and own != BIAS:
            total += weights[path] if own == WEIGHT else 0
        elif own not in (*FOR_INPUT, DIVISOR):
            total += value.size
    return total


def numbers_in_words(words: Sized, bits: int) -> int:
    """How many codes are in packed words uint32, in rows that fill them, as those of MLX's own layers do."""
    return words.size * 32 // bits


@dataclass(frozen=True)
class Size:
    """Stored size of a model. ``bits_per_weight`` is stored bits over parameters of the whole model, as mlx-lm prints
    it; ``bits_per_quantized_weight`` is over the quantized layers alone: codes, scales and biases; None without any.
    """

    model_bytes: int
    bits_per_weight: float
    bits_per_quantized_weight: float | None

    @classmethod
    def of(cls, layers: Mapping[str, QuantizedLayer], arrays: Mapping[str, mx.array]) -> Size:
        """``arrays`` are everything that is stored, by full name, those of the ``layers`` among them."""
        weights = {path: prod(layer.shape) for path, layer in layers.items()}
        stored, codes = sum(v.nbytes for v in arrays.values()), sum(layer.nbytes for layer in layers.values())
        own = 8 * codes / sum(weights.values()) if weights else None
        return cls(stored, 8 * stored / numbers_in(arrays.items(), weights), own)


@dataclass(frozen=True)
class LayerSize:
    """A quantized layer: the class that it was, its weight's shape, the bytes of its weight before and after, and the
    relative error of that weight, ‖W − Q‖ / ‖W‖.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    format: str
    before: int
    after: int
    error: float


@dataclass(frozen=True)
class KeptLayer:
    """A module with matrices of its own that stayed as it was: their bytes, and the reason."""

    path: str
    kind: str
    nbytes: int
    reason: str


@dataclass(frozen=True)
class SizeReport:
    """``before`` and ``after`` are bytes of the whole module, ``weights`` the numbers that it stands for; prints as a
    table.
    """

    layers: tuple[LayerSize, ...]
    kept: tuple[KeptLayer, ...]
    before: int
    after: int
    weights: int

    @property
    def ratio(self) -> float:
        """How many times smaller the module is."""
        return self.before / self.after

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over all parameters, as mlx-lm prints it."""
        return 8 * self.after / self.weights

    @property
    def facts(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "ratio": self.ratio, "bits_per_weight": self.bits_per_weight}

    def __str__(self) -> str:
        rows = [("layer", "count", "kind", "format", "error", "MB before", "MB after"), *_grouped(self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [
            f"kept: {path} x{count}, {_mb(nbytes)} MB: {reason}" for path, reason, count, nbytes in _alike(self.kept)
        ]
        change = f"{_mb(self.before)} MB before, {_mb(self.after)} MB after ({self.ratio:.2f} times smaller)"
        return "\n".join([*lines, f"{change}, {self.bits_per_weight:.2f} bits per weight, {self.weights} weights"])


def _grouped(layers: Iterable[LayerSize]) -> Iterator[tuple[str, ...]]:
    """Rows of a table, one for all layers that differ in a number of their path alone; the error is the worst."""
    alike: dict[tuple[str, str, str], list[LayerSize]] = {}
    for layer in layers:
        alike.setdefault((starred(layer.path), layer.kind, layer.format), []).append(layer)
    for (path, kind, format), found in alike.items():
        before, after = sum(one.before for one in found), sum(one.after for one in found)
        yield path, str(len(found)), kind, format, f"{max(one.error for one in found):.4f}", _mb(before), _mb(after)


def _alike(kept: Iterable[KeptLayer]) -> Iterator[tuple[str, str, int, int]]:
    alike: dict[tuple[str, str], list[KeptLayer]] = {}
    for layer in kept:
        alike.setdefault((starred(layer.path), layer.reason), []).append(layer)
    for (path, reason), found in alike.items():
        yield path, reason, len(found), sum(one.nbytes for one in found)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3f}"


def is_hidden(path: str) -> bool:
    """Whether what is at a path is none of a module's parameters, to MLX: a part of its name starts with an
    underscore.
    """
    return any(part.startswith("_") for part in path.split("."))


def is_packed(module: nn.Module) -> bool:
    """Whether a module holds a quantized weight, ours or that of MLX."""
    weight = module.get(WEIGHT)
    return isinstance(weight, mx.array) and weight.dtype == mx.uint32 and SCALES in module


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters of a module."""
    return sum({id(value): value.nbytes for value in parameters(module).values()}.values())


def weight_count(module: nn.Module) -> int:
    """For how many numbers a module's parameters stand, each array counted once wherever it is used."""
    once = {id(value): (name, value) for name, value in reversed(parameters(module).items())}
    weights = {path: _numbers(part) for path, part in module.named_modules() if is_packed(part)}
    return numbers_in(once.values(), weights)


def _numbers(packed: nn.Module) -> int:
    """How many numbers stand in the weight of a quantized layer."""
    if isinstance(packed, QuantizedLayer):
        return prod(packed.shape)
    return numbers_in_words(packed.weight, packed.bits)
