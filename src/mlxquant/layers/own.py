"""What every module of mlxquant's own says of itself, so that nobody has to guess by its class or its address.

A model that is saved, cloned or exported is walked module by module. One of ours says what keeps it from being a plain
module of MLX's (``obstacles``); one that is stored with a model says, too, how it is rebuilt (``facts`` and ``blank``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.nn as nn

from ..files.schema import Schema, anything
from ..grids.time import Clock


@dataclass(frozen=True)
class Obstacle:
    """``what`` a layer has that a plain one has no place for, and the ``remedy``. Without activation scales the layer
    still runs.
    """

    what: str
    remedy: str
    activations: bool = False


class OwnModule(nn.Module):
    """A module that MLX's programs do not have. Those that stand in a model only while something is measured need not
    say so.
    """

    def obstacles(self) -> list[Obstacle]:
        """Everything that keeps this module, without those inside of it, from being one of MLX's own."""
        return [Obstacle(f"a {type(self).__name__}, a layer of mlxquant's own", "quantize without it")]


class QuantizedModule(OwnModule):
    """A module that is stored with a model: its parameters in a tensor file, its structure as plain data beside.

    A kind must give ``facts`` and ``blank``. They are no abstract methods, for those are refused by ``object``'s
    constructor, and a module of MLX is made by ``dict``'s.

    ``STRUCTURE`` says what ``facts`` have to be before ``blank`` is asked.
    """

    STRUCTURE: ClassVar[Schema] = anything

    @property
    def facts(self) -> dict[str, Any]:
        """The structure as plain data: what ``blank`` needs to rebuild it."""
        raise NotImplementedError

    @classmethod
    def blank(cls, facts: Mapping[str, Any], clock: Clock | None) -> Self:
        """A module of the structure that ``facts`` describes, to be filled with ``load_weights`` and ``refresh``.

        Its parameters are not evaluated, so a blank takes neither time nor memory.
        """
        raise NotImplementedError

    def refresh(self) -> None:
        """Forget what was computed from the parameters, to compute it again when it is needed; call it after
        ``load_weights``.
        """

    @classmethod
    def _bare(cls) -> Self:
        """A module without parameters: MLX's constructor has run on it, its own, which takes values, has not."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        return module
