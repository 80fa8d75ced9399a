"""How large a module is, before and after: bytes that are really stored, and which layers stayed as they were and why.

An array that is used at several places counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .names import SCALES, WEIGHT
from .packed import QuantizedLayer
from .tree import parameters, starred


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
    """For how many numbers a module's parameters stand; scales and what quantizes an input are none of them."""
    sizes = {id(value): value.size for value in parameters(module).values()}
    for _, part in module.named_modules():
        if is_packed(part):
            packed = {name: value for name, value in parameters(part).items() if name != "bias"}
            sizes.update({id(value): 0 for value in packed.values()})
            sizes[id(part.weight)] = _numbers(part)
    return sum(sizes.values())


def _numbers(packed: nn.Module) -> int:
    """How many numbers stand in the weight of a quantized layer."""
    if isinstance(packed, QuantizedLayer):
        return prod(packed.shape)
    return int(packed.weight.size * 32 // packed.bits)
