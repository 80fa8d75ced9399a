"""The kinds of quantized layers: which layer of MLX each stands for, how one is made of it, and how one is rebuilt.

A new kind is a subclass of ``QuantizedLayer`` and a line here. What watches layers, rounds, replaces, writes, loads,
clones and counts them asks this table, and names no kind. To whoever rounds, every kind is one matrix or several, and
rows of inputs for each.
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
from .product import QuantizedProduct
from .switch import QuantizedSwitchLinear, SwitchLinear
from .tree import natural
from .weight_only import W8A16Linear, quantized_linear


@dataclass(frozen=True)
class Kind:
    """``replaces`` is a class of MLX, ``classes`` those of ours that stand for it, the usual one first;
    ``quantized(module, format, steps)`` makes one of a module, rounded without data.
    """

    replaces: type[nn.Module]
    classes: tuple[type[QuantizedProduct], ...]
    quantized: Callable[[Any, WeightFormat, str], QuantizedProduct]

    @property
    def form(self) -> type[QuantizedProduct]:
        """The usual class: what can be asked of a module that is still in full precision."""
        return self.classes[0]

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Rows and width of a module's weight as a matrix, those of all parts."""
        width = self.form.width_of(module.weight.shape)
        return (module.weight.size // width if width else int(module.weight.shape[0]), width)

    def parts(self, module: nn.Module) -> int:
        return self.form.parts_of(module)

    def tells_outputs(self, module: nn.Module) -> bool:
        """Whether ``read_outputs`` says which output was made of which row: of a weight that is one matrix."""
        return self.form.tells_outputs and self.parts(module) == 1


KINDS = (
    Kind(nn.Linear, (QuantizedLinear, W8A16Linear), quantized_linear),
    Kind(nn.Embedding, (QuantizedEmbedding,), QuantizedEmbedding.from_embedding),
    *(Kind(one.replaces, (one,), QuantizedConvolution.from_convolution) for one in CONVOLUTIONS),
    Kind(SwitchLinear, (QuantizedSwitchLinear,), QuantizedSwitchLinear.from_switch),
)
BY_NAME = {one.__name__: one for kind in KINDS for one in kind.classes}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that stands for a module of MLX, or of a class that is derived from MLX's."""
    return next((kind for kind in KINDS if isinstance(module, kind.replaces)), None)


def known_kind(module: nn.Module) -> Kind:
    """``kind_of`` a module that has one."""
    kind = kind_of(module)
    assert kind is not None
    return kind


def find_exact_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every layer in full precision that has a quantized form, by path, in path order with numbers compared as
    numbers. What is derived from a class of MLX's and computes something else is left out, but for Linears.
    """
    found = {
        path: part
        for path, part in module.named_modules()
        if (kind := kind_of(part)) is not None and (kind.replaces is nn.Linear or kind.form.is_plain(part))
    }
    return {path: found[path] for path in sorted(found, key=natural)}


def find_layers(module: nn.Module) -> dict[str, QuantizedProduct]:
    """Every layer with an integer weight, by path: of all kinds."""
    return {path: part for path, part in module.named_modules() if isinstance(part, QuantizedProduct)}


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


def layer_facts(layers: Mapping[str, QuantizedProduct]) -> dict[str, Any]:
    """What ``rebuilt`` needs of layers, by path; of a linear layer without the name of its class."""
    return {
        path: layer.facts if type(layer) is QuantizedLinear else {"class": type(layer).__name__, **layer.facts}
        for path, layer in layers.items()
    }


def rebuilt(facts: Mapping[str, Any], clock: Clock | None) -> QuantizedProduct:
    """A blank layer of the structure ``facts``, of the class that they name; a linear layer where they name none.

    Raises KeyError on the name of a class that is none of ours.
    """
    return BY_NAME[facts.get("class", QuantizedLinear.__name__)].blank(facts, clock)
