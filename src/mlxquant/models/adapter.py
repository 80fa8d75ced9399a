"""The contract between a model and everything else. Methods see arrays, the sweep sees stages, and only an adapter
knows its host.

A model is a chain of stages (embedders, blocks, head) that pass a state from one to the next; the chain equals the
model. That is all a block-by-block quantizer needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..errors import AdapterError, NumericsError
from ..files import checked
from ..files.array_memory import ArrayMemory
from ..files.atomic import relative_place
from ..files.checked import array_digest
from ..grids.time import Clock
from ..layers.attention import SoftmaxAttention, find_attentions
from ..layers.tree import find_linears, parameters

State = dict[str, mx.array]
_digest = ArrayMemory(array_digest)


def written(outputs: State, inputs: State) -> list[str]:
    """What a stage wrote: the keys of its outputs whose array is not the very object that came in."""
    return [key for key, value in outputs.items() if inputs.get(key) is not value]


@dataclass(frozen=True)
class Stage:
    """One link of the chain: ``run`` maps state to state and uses only modules below ``prefixes``. Blocks, the links
    between the first and the last, pass on what they do not know.
    """

    name: str
    prefixes: tuple[str, ...]
    run: Callable[[State], State]

    def owns(self, path: str) -> bool:
        return any(path == prefix or path.startswith(prefix + ".") for prefix in self.prefixes)


Observe = Callable[[str, State, State], None]


class StageHook:
    """Shows the state before and after one stage to an observer and passes it on. It stands in for the stage's ``run``,
    outside of the module tree: not an ``nn.Module``, so parameters and paths are the same while it is there.
    """

    def __init__(self, name: str, run: Callable[[State], State], observe: Observe):
        self._name, self._run, self._observe = name, run, observe

    def __call__(self, state: State) -> State:
        outputs = self._run(state)
        self._observe(self._name, state, outputs)
        return outputs


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
    """``consumers`` read one and the same tensor. Where ``folds`` are given, its channels can be divided by any
    positive vector by changing those producers alone; where there are none, whoever wants to divide has to do it while
    the model runs. Inside of runs of ``mixes`` channels (1: none) the producers can absorb any linear mixing as well.
    ``reorders`` are producers whose rows are the tensor's channels up to a nonlinearity, so that its channels can be
    put in any order. ``after`` names the nonlinearity that wrote the tensor, such as "gelu", and with it the skew of
    what is in it.
    """

    consumers: tuple[str, ...]
    folds: tuple[Fold, ...] = ()
    after: str = ""
    mixes: int = 1
    reorders: tuple[Fold, ...] = ()


class Adapter(ABC):
    """A model, seen from the outside. Subclasses fill in the abstract members; the rest follows from them."""

    name: str  # as on the command line
    module: nn.Module  # the tree that holds every parameter that is saved
    clock: Clock  # set around every forward pass
    batch: int = 16  # samples that run at once
    samples: int | None = None  # default number of samples that calibrate a sweep; None takes all
    rows: int = 16  # of a batch that one backward pass through a block may have
    draws: bool = True  # from noise, by the velocity that it predicts at each noise level; False where it writes text
    place: str = (
        ""  # where weights that ``module`` does not hold come from: a folder, a hub id, or "" for the usual one
    )
    _hooks: Mapping[str, StageHook] = MappingProxyType({})  # by stage, set by ``hooked``

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The chain, from what the model reads to what it predicts."""

    @property
    def blocks(self) -> tuple[Stage, ...]:
        """The stages between the first and the last: what is repeated, and most of the model."""
        return self.stages[1:-1]

    @abstractmethod
    def role(self, path: str) -> str:
        """What a Linear is for: attention, mlp, modulation, embedder or output."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain data from which ``blank`` rebuilds the structure (without weights)."""

    @classmethod
    @abstractmethod
    def blank(cls, description: dict[str, Any]) -> Self:
        """The same structure with unspecified weights, for loading."""

    def twin(self) -> Self:
        """The same structure with unspecified weights; what is outside of ``module`` is shared."""
        return type(self).blank(self.describe())

    def save_beside(self, folder: Path) -> str:
        """Write what a saved model needs besides its parameters into ``folder``; returns the place to load that from,
        as seen there.
        """
        return relative_place(self.place, folder)

    def edges(self) -> tuple[Edge, ...]:
        """Which layers read the same tensor, and what can be folded into what wrote it. Each layer is in at most one
        edge.
        """
        return ()

    def linears(self) -> dict[str, nn.Linear]:
        return find_linears(self.module)

    def roles(self) -> dict[str, str]:
        """The role of each of ``linears``, by path: what a recipe plans from."""
        return {path: self.role(path) for path in self.linears()}

    def attentions(self) -> dict[str, SoftmaxAttention]:
        """The attentions that can be opened, by path: ``set_module`` may put a ``QuantizedAttention`` there. Empty
        where it has none.
        """
        return find_attentions(self.module)

    @property
    def fingerprint(self) -> str:
        """sha256 over all parameters; an array is hashed again only when it is another or has changed."""
        return checked.digest({name: _digest(value) for name, value in parameters(self.module).items()})

    def check_finite(self) -> None:
        """Raise NumericsError, naming the tensor, when a parameter holds NaN or infinity."""
        for name, value in parameters(self.module).items():
            if mx.issubdtype(value.dtype, mx.floating) and not bool(mx.isfinite(value).all().item()):
                bad = int(np.array((~mx.isfinite(value)).sum()))
                raise NumericsError(
                    f"{self.name}: parameter {name} holds {bad} NaN or infinite values of {value.size}; repair the"
                    " checkpoint"
                )

    def run(self, state: State, sigma: float | npt.NDArray[Any]) -> State:
        """Send a state through the chain, at one noise level or at one for each sample; evaluated."""
        with self.clock.at(sigma):
            for stage in self.stages:
                state = self._hooks.get(stage.name, stage.run)(state)
            mx.eval(state)
        return state


@contextmanager
def hooked(adapter: Adapter, names: Iterable[str], observe: Observe) -> Iterator[None]:
    """Call ``observe(name, inputs, outputs)`` for each of these stages in the forward passes inside.

    The states are not evaluated yet; an observer keeps what it needs and evaluates everything at once. The hooks are
    gone afterwards, also after an exception. Raises AdapterError on a stage that the model does not have.
    """
    before, runs = adapter._hooks, {stage.name: stage.run for stage in adapter.stages}
    names = list(names)
    if unknown := [name for name in names if name not in runs]:
        raise AdapterError(f"{adapter.name} has no stages {unknown}; its stages are {list(runs)}")
    adapter._hooks = {**before, **{name: StageHook(name, before.get(name, runs[name]), observe) for name in names}}
    try:
        yield
    finally:
        adapter._hooks = before
