"""Edges: which layers of a model read the same tensor, and what can be folded into what wrote it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fold:
    """Rows ``start`` to ``stop`` of the Linear at ``path`` write the channels of an edge; with ``plus_one`` they are
    used as 1 + y.
    """

    path: str
    start: int
    stop: int
    plus_one: bool = False


@dataclass(frozen=True)
class Edge:
    """A tensor inside the model: who reads it, and what can be folded into what wrote it.

    Attributes:
        consumers: Paths of the Linears that read one and the same tensor.
        folds: Producers by which its channels can be divided by any positive vector, all of them together. Where there
            are none, whoever wants to divide has to do it while the model runs.
        after: The nonlinearity that wrote the tensor, such as "gelu", and with it the skew of what is in it; "" where
            there is none.
        mixes: Inside of runs of so many channels the producers can absorb any linear mixing as well; 1 for none.
        reorders: Producers whose rows are the tensor's channels up to a nonlinearity, so that its channels can be put
            in any order.
    """

    consumers: tuple[str, ...]
    folds: tuple[Fold, ...] = ()
    after: str = ""
    mixes: int = 1
    reorders: tuple[Fold, ...] = ()
