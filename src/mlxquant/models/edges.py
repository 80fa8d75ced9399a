"""Edges: which layers of a model read the same tensor, and what can be folded into what wrote it.

A tensor may be a part of what its consumers read: where attention and MLP are concatenated before one layer (FLUX's
single blocks), two edges name that layer, each with its own ``columns``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.nn as nn

from ..errors import AdapterError
from ..layers.kinds import kind_of
from ..layers.tree import get_module

Span = tuple[int, int]  # from here up to there
After = Sequence[tuple[Span | None, str]]  # by columns of a layer's input, the nonlinearity that wrote them


@dataclass(frozen=True)
class Fold:
    """Who writes the channels of an edge: rows ``start`` to ``stop`` of the Linear at ``path`` and of its bias, or of a
    norm (any module whose ``weight`` is a vector [C]) its gains and biases there. With ``plus_one`` what a Linear
    writes, or a norm's gain, is used as 1 + y.

    Attributes:
        path: Of the module.
        start: The first row or gain.
        stop: The one behind the last.
        plus_one: Whether a 1 is added before it is used.
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
        mixes: Inside of runs of so many channels the producers can absorb any linear mixing as well; 1 for none. A norm
            can absorb none.
        reorders: Producers whose rows are the tensor's channels up to a nonlinearity, so that its channels can be put
            in any order.
        columns: Where the tensor stands in what its consumers read; None where it is all of it. Edges of one layer have
            disjoint columns; channels that none of them speaks of are taken to be of their own.
    """

    consumers: tuple[str, ...]
    folds: tuple[Fold, ...] = ()
    after: str = ""
    mixes: int = 1
    reorders: tuple[Fold, ...] = ()
    columns: Span | None = None

    @property
    def name(self) -> str:
        """By its first consumer, and columns where it has some."""
        return self.consumers[0] + ("" if self.columns is None else f"[{self.columns[0]}:{self.columns[1]}]")

    @property
    def part(self) -> slice:
        """Of what its consumers read."""
        return slice(None) if self.columns is None else slice(*self.columns)

    @property
    def producers(self) -> tuple[Fold, ...]:
        """All that could absorb something."""
        return (*self.folds, *self.reorders)


def whole(edges: Iterable[Edge]) -> tuple[Edge, ...]:
    """Edges that are all that their consumers read: for whoever cannot treat columns apart, and takes other layers to
    read a tensor of their own.
    """
    return tuple(edge for edge in edges if edge.columns is None)


def written_by(edges: Iterable[Edge]) -> dict[str, After]:
    """By path of a layer the nonlinearities that wrote its input."""
    found: dict[str, list[tuple[Span | None, str]]] = {}
    for edge in edges:
        for path in edge.consumers if edge.after else ():
            found.setdefault(path, []).append((edge.columns, edge.after))
    return dict(found)


def check_edges(model: str, module: nn.Module, edges: Iterable[Edge]) -> None:
    """Refuse edges that cannot be as they say, before anything is folded by them.

    Whether what they say of the function is true shows only when it is folded: ``sweep.folding.check_folds``.

    Args:
        model: Its name, for the error.
        module: The tree that they are about.
        edges: As ``Adapter.edges`` has them.

    Raises:
        AdapterError: A path is not in the tree, a width or a range does not fit, two edges speak of the same channels,
            or a norm is to absorb a mixing or an order.
    """
    taken: dict[str, list[tuple[Span, str]]] = {}
    for edge in edges:
        try:
            _check(module, edge, taken)
        except AdapterError as error:
            where = f"the edge into {edge.name}" if edge.consumers else "an edge"
            raise AdapterError(f"{model}: {where}: {error}; correct the adapter's edges") from error


def _check(module: nn.Module, edge: Edge, taken: dict[str, list[tuple[Span, str]]]) -> None:
    """One edge; ``taken`` has by layer what others before speak of, and gets this one's."""
    if not edge.consumers:
        raise AdapterError("it has no consumers")
    widths = set[int]()
    for path in edge.consumers:
        shape = _shape(module, path)
        if len(shape) < 2:
            raise AdapterError(f"{path} is read as a consumer, but its weight is a vector {list(shape)}")
        kind = kind_of(get_module(module, path))
        grouped = getattr(get_module(module, path), "groups", 1) > 1
        if kind is None or grouped or kind.form.width_of(shape) != shape[-1]:
            raise AdapterError(
                f"{path} is no layer that reads channels one by one (a convolution reads patches of them)"
            )
        start, stop = edge.columns or (0, shape[-1])
        if not 0 <= start < stop <= shape[-1]:
            raise AdapterError(f"columns {start} to {stop} are not among the {shape[-1]} that {path} reads")
        for (first, last), other in taken.setdefault(path, []):
            if start < last and first < stop:
                raise AdapterError(f"{path} reads its columns {start} to {stop} by it, and by {other} as well")
        taken[path].append(((start, stop), edge.name))
        widths.add(stop - start)
    if len(widths) > 1:
        raise AdapterError(f"its consumers read {' and '.join(map(str, sorted(widths)))} channels, and not one tensor")
    width = widths.pop()
    if edge.mixes < 1 or width % edge.mixes:
        raise AdapterError(f"runs of {edge.mixes} channels do not divide its {width}")
    for fold in edge.producers:
        shape = _shape(module, fold.path)
        if not 0 <= fold.start < fold.stop <= shape[0]:
            raise AdapterError(f"rows {fold.start} to {fold.stop} are not among the {shape[0]} of {fold.path}")
        if fold.stop - fold.start != width:
            raise AdapterError(f"{fold.path} writes {fold.stop - fold.start} channels of it, and it has {width}")
        kind = kind_of(get_module(module, fold.path))
        if kind is not None and kind.parts(get_module(module, fold.path)) > 1:
            raise AdapterError(f"{fold.path} has several matrices, and an edge is about one")
        if len(shape) == 1 and (edge.mixes > 1 or fold in edge.reorders):
            raise AdapterError(f"{fold.path} is a norm, which can absorb a division and neither a mixing nor an order")
        if len(shape) > 1 and fold.plus_one and "bias" not in get_module(module, fold.path):
            raise AdapterError(f"{fold.path} has no bias, and cannot absorb the division of 1 + y")


def _shape(module: nn.Module, path: str) -> tuple[int, ...]:
    """Of the weight of what is at a path; raises AdapterError where it has none."""
    weight = getattr(get_module(module, path), "weight", None)
    if weight is None:
        raise AdapterError(f"{path} has no weight")
    return tuple(weight.shape)
