"""How much of a model a recipe quantizes, and what stays in float, by reason: told before anything is calibrated, for a
recipe that leaves most of a model alone looks like any other when it is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import RecipeError
from ..layers.kinds import kind_of
from ..layers.names import WEIGHT
from ..layers.tree import get_module, parameters
from ..models.adapter import Adapter
from ..models.stages import is_at
from ..recipes.recipe import LayerSpec
from ..recipes.roles import EMBEDDING

QUANTIZED = "quantized"


@dataclass(frozen=True)
class Amount:
    """Numbers, and their bytes in full precision."""

    numbers: int = 0
    nbytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.numbers + other.numbers, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class Share:
    """What becomes of a model's parameters: those of the weights that are ``quantized``, and those that stay, ``kept``
    by reason, the largest first.
    """

    quantized: Amount
    kept: Mapping[str, Amount]

    @property
    def all(self) -> Amount:
        return sum(self.kept.values(), self.quantized)

    @property
    def parameters(self) -> float:
        """The quantized share of the model's numbers, 0 to 1."""
        return self.quantized.numbers / max(1, self.all.numbers)

    @property
    def nbytes(self) -> float:
        """The quantized share of the model's bytes in full precision, 0 to 1."""
        return self.quantized.nbytes / max(1, self.all.nbytes)

    @property
    def facts(self) -> dict[str, Any]:
        """As plain data: shares, and what stays by reason."""
        kept = {reason: {"parameters": one.numbers, "bytes": one.nbytes} for reason, one in self.kept.items()}
        return {"parameters": self.parameters, "bytes": self.nbytes, "kept": kept}

    def __str__(self) -> str:
        head = f"{_percent(self.parameters)} of the parameters and {_percent(self.nbytes)} of the bytes are quantized"
        return f"{head}; in float stay {self.reasons}" if self.kept else head

    @property
    def reasons(self) -> str:
        """What stays in float, in words."""
        every = max(1, self.all.numbers)
        return ", ".join(f"{_percent(one.numbers / every)} ({reason})" for reason, one in self.kept.items())

    def require(self, least: float, name: str) -> None:
        """Raise RecipeError where the recipe of this name quantizes less than that share of the parameters."""
        if self.parameters < least:
            raise RecipeError(
                f"recipe {name} quantizes {_percent(self.parameters)} of the parameters, and {_percent(least)} are"
                f" required; in float stay {self.reasons}; ask for less, or add '+embeddings' or an override for them"
            )


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def planned_share(adapter: Adapter, plan: Mapping[str, LayerSpec]) -> Share:
    """What a plan for the layers of a model in full precision makes of its parameters; an array that is used at several
    places counts once.
    """
    weights = {id(layer.weight) for path, layer in adapter.layers().items() if path in plan}
    known = _Reasons(adapter, plan)
    amounts: dict[str, Amount] = {}
    for name, value in _once(adapter.module):
        reason = QUANTIZED if id(value) in weights else known.of(name, value)
        amounts[reason] = amounts.get(reason, Amount()) + Amount(value.size, value.nbytes)
    quantized = amounts.pop(QUANTIZED, Amount())
    return Share(quantized, dict(sorted(amounts.items(), key=lambda found: -found[1].numbers)))


def _once(module: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """All parameters, each array under its first name."""
    seen = set[int]()
    for name, value in parameters(module).items():
        if id(value) not in seen:
            seen.add(id(value))
            yield name, value


class _Reasons:
    """Why a parameter stays as it is."""

    def __init__(self, adapter: Adapter, plan: Mapping[str, LayerSpec]):
        self._module, self._plan, self._left_out = adapter.module, plan, adapter.left_out()
        self._roles = adapter.roles()
        self._reached = [stage for stage in adapter.stages if any(stage.owns(path) for path in plan)]

    def of(self, name: str, value: mx.array) -> str:
        """That of the parameter of this name."""
        path, _, leaf = name.rpartition(".")
        for prefix, reason in self._left_out.items():
            if is_at(path, prefix):
                return reason
        if path in self._plan:
            return "bias"
        if path in self._roles and leaf == WEIGHT:
            if self._roles[path] == EMBEDDING:
                return EMBEDDING
            within = any(stage.owns(path) for stage in self._reached)
            return "refused by the recipe" if within else "in stages that the recipe leaves alone"
        module = get_module(self._module, path) if path else self._module
        if "Norm" in type(module).__name__:
            return "norm"
        if path in self._roles:
            return "bias"
        if value.ndim < 2:
            return "vectors"
        kind = kind_of(module)
        what = type(module).__name__
        return f"no quantized form of {what}" if kind is None else f"{what} computes something of its own"
