"""A model under judgement, and under which names the report has it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..api.model import Model, QuantizedModel


@dataclass(frozen=True)
class Contender:
    """``name`` is what people read, ``folder`` where its files are, ``source`` what determines its pictures; each is
    told apart by them.
    """

    name: str
    folder: str
    model: Model
    source: str
    seconds: float | None = None  # that it took to quantize, where we know

    @property
    def quantized(self) -> QuantizedModel | None:
        return self.model if isinstance(self.model, QuantizedModel) else None

    @property
    def recipe(self) -> str | None:
        return None if self.quantized is None else str(self.quantized.facts["recipe"]["name"])


def distinct(labels: Iterable[str]) -> list[tuple[str, str]]:
    """Names that differ, and folder names for them, in order: a label that was taken gets a number, as does a
    folder.
    """
    names: dict[str, str] = {}
    for label in labels:
        name = _free(label, set(names))
        names[name] = _free(re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "model", set(names.values()))
    return list(names.items())


def _free(wanted: str, taken: set[str]) -> str:
    """``wanted``, or with the first free number behind it; names that differ by case alone are one, as some disks have
    it.
    """
    lower, name, number = {other.lower() for other in taken}, wanted, 2
    while name.lower() in lower:
        name, number = f"{wanted}-{number}", number + 1
    return name
