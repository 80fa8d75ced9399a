"""The kinds of quantized layers: which layer of MLX each stands for, how one is made of it, and how one is rebuilt.

A new kind is a subclass of ``QuantizedLayer`` and a line here. What replaces layers, writes them, loads them, clones
and counts them asks this table, and names no kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from ..files import schema
from ..grids.time import Clock
from ..grids.weights import WeightFormat
from .convolutions import CONVOLUTIONS, QuantizedConvolution
from .embeddings import QuantizedEmbedding
from .linear import QuantizedLinear
from .own import QuantizedModule
from .packed import QuantizedLayer
from .weight_only import W8A16Linear, quantized_linear


@dataclass(frozen=True)
class Kind:
    """``replaces`` is a class of MLX, ``classes`` those of ours that stand for it, ``quantized(module, format, steps)``
    makes one of a module, rounded without data.
    """

    replaces: type[nn.Module]
    classes: tuple[type[QuantizedLayer], ...]
    quantized: Callable[[Any, WeightFormat, str], QuantizedLayer]


KINDS = (
    Kind(nn.Linear, (QuantizedLinear, W8A16Linear), quantized_linear),
    Kind(nn.Embedding, (QuantizedEmbedding,), QuantizedEmbedding.from_embedding),
    *(Kind(one.replaces, (one,), QuantizedConvolution.from_convolution) for one in CONVOLUTIONS),
)
BY_NAME = {one.__name__: one for kind in KINDS for one in kind.classes}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that stands for a module of MLX, or of a class that is derived from MLX's."""
    return next((kind for kind in KINDS if isinstance(module, kind.replaces)), None)


def find_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """Every layer with an integer weight, by path: of all kinds."""
    return {path: part for path, part in module.named_modules() if isinstance(part, QuantizedLayer)}


def blanks(module: nn.Module, clock: Clock | None) -> dict[str, QuantizedModule]:
    """What is quantized in a module, by path, each of its own class and structure, without its values."""
    found = {path: part for path, part in module.named_modules() if isinstance(part, QuantizedModule)}
    return {path: type(part).blank(part.facts, clock) for path, part in found.items()}


def refresh(module: nn.Module) -> None:
    """Let everything quantized in a module know that its parameters were loaded."""
    for part in module.modules():
        if isinstance(part, QuantizedModule):
            part.refresh()


def structure(value: Any, where: str) -> None:
    """The schema of what ``rebuilt`` takes: that of the class which it names."""
    schema.entries({}, {"class": schema.one_of(*BY_NAME)})(value, where)
    BY_NAME[value.get("class", QuantizedLinear.__name__)].STRUCTURE(value, where)


def rebuilt(facts: Mapping[str, Any], clock: Clock | None) -> QuantizedLayer:
    """A blank layer of the structure ``facts``, of the class that they name; a linear layer where they name none.

    Raises KeyError on the name of a class that is none of ours.
    """
    return BY_NAME[facts.get("class", QuantizedLinear.__name__)].blank(facts, clock)
