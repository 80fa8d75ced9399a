"""The contract between a model and everything else: methods see arrays, the sweep sees stages, and only an adapter
knows its host.

A model is told as a chain of stages (embedders, blocks, head). Each maps a state, a dictionary of arrays, to the next
state, and the chain as a whole computes what the model computes. That is all that a quantizer needs which works stage
by stage: it can run one stage alone, watch its layers, put others in their places, and compare what it then writes. A
state instead of a call with arguments is what lets one sweep serve pictures, with two streams of tokens and a
conditioning, and text, with one.

What an adapter promises; ``tests/support/adapter_contract`` holds every picture model to it:

- The chain computes what the model computes, for a batch as for its rows one by one.
- Stages name the modules that they use, and no layer belongs to two. Modules are looked up when a stage runs, never
  kept, so that whatever stands at their paths by then is what runs: taps, stand-ins and quantized layers are put
  there.
- A stage hands on an array that it does not change as the very same object: that is how one tells what it ``written``.
  Likewise, one tensor under two keys is one object, and counts once.
- The clock is set around every forward pass, because quantized layers look their tables up at the time that it shows.
- An edge (who reads the same tensor, and who writes it) never lies: folding by it leaves the function the same.

An adapter refuses what its host cannot do with an AdapterError, before anything long starts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import AdapterError
from ..files import checked
from ..files.array_memory import ArrayMemory
from ..files.atomic import relative_place
from ..files.checked import array_digest
from ..files.schema import Schema, anything
from ..grids.time import Clock
from ..layers.attention import SoftmaxAttention, find_attentions
from ..layers.kinds import find_exact_layers
from ..layers.tree import parameters, require_finite
from ..numerics.arrays import Array
from ..recipes.roles import EMBEDDING, Role
from .checkpoints.source import Source
from .edges import Edge
from .stages import Observe, Stage, StageHook, State, is_at

_digest = ArrayMemory(array_digest)


class Adapter(ABC):
    """A model, seen from the outside. Subclasses fill in the abstract members; the rest follows from them.

    Attributes:
        name: As on the command line.
        module: The tree that holds every parameter that is saved.
        clock: Shows the noise level, set around every forward pass.
        batch: How many samples run at once.
        samples: How many samples calibrate a sweep where nobody says; None takes all.
        rows: How many samples one backward pass through a block may have: what memory allows.
        draws: Whether it draws from noise, by the velocity that it predicts at each noise level; False where it writes
            text.
        renews: Whether calibration can be made again on what the quantized model does, though it does not draw.
        timed: Whether its inputs differ by noise level.
        place: Where weights that ``module`` does not hold come from: a folder, a hub id, or "" for the usual one.
        hub_ids: Hub ids that stand for the model, for ``pretrained``.
    """

    name: str
    module: nn.Module
    clock: Clock
    batch: int = 16
    samples: int | None = None
    rows: int = 16
    draws: bool = True
    renews: bool = False
    timed: bool = True
    place: str = ""
    hub_ids: ClassVar[tuple[str, ...]] = ()
    STRUCTURE: ClassVar[Schema] = anything  # what ``describe`` gives, before ``blank`` builds from it
    _hooks: Mapping[str, StageHook] = MappingProxyType({})  # by stage, set by ``hooked``

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The chain, from what the model reads to what it predicts; at least two. The same objects every time."""

    @property
    def blocks(self) -> tuple[Stage, ...]:
        """The stages between the first and the last: what is repeated, and most of the model."""
        return self.stages[1:-1]

    @abstractmethod
    def role(self, path: str) -> str:
        """What a layer is for, so that recipes can treat layers alike without naming them.

        Args:
            path: One of ``layers`` that is no embedding.

        Returns:
            "attention", "mlp", "modulation", "embedder", "output", which recipes know, or any other word; a ``Role``
            where its layers want care.
        """

    @classmethod
    @abstractmethod
    def pretrained(cls, place: str = "") -> Self:
        """The model with its full-precision weights.

        Args:
            place: A folder or a hub id; "" for the usual one.

        Raises:
            AdapterError: The model has no such place, or cannot be run here.
            ArtifactError: The weights are missing or damaged.
        """

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """Whether a folder has weights that ``pretrained`` loads, so that its path stands for the model.

        Args:
            folder: Any folder, of any program's.
        """
        return False

    @classmethod
    def fits(cls, source: Source) -> bool:
        """Of the models that one pipeline of diffusers draws with, whether a copy at ``source`` is of this one."""
        return True

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain data, as JSON has it, from which ``blank`` rebuilds the structure (without weights). Saved with a
        quantized model.
        """

    @classmethod
    @abstractmethod
    def blank(cls, description: dict[str, Any]) -> Self:
        """The same structure with unspecified weights, for loading.

        Args:
            description: What ``describe`` gave, perhaps in an earlier release.
        """

    @classmethod
    def described(cls, description: Any) -> Self:
        """What ``blank`` makes of a description that came from a file.

        Args:
            description: What ``describe`` gave, perhaps.

        Raises:
            MismatchError: When it is not of the model's ``STRUCTURE``; nothing is built then.
        """
        cls.STRUCTURE(description, "model")
        return cls.blank(description)

    def twin(self) -> Self:
        """The same structure with unspecified weights; what is outside of ``module``, such as text encoders, is
        shared.
        """
        return type(self).blank(self.describe())

    def save_beside(self, folder: Path) -> str:
        """Write what a saved model needs besides its parameters.

        Args:
            folder: Where the model is being saved.

        Returns:
            The ``place`` to load that from, as seen from the folder.
        """
        return relative_place(self.place, folder)

    def edges(self) -> tuple[Edge, ...]:
        """Which layers read the same tensor, and what can be folded into what wrote it. Each layer is in at most one
        edge; a layer in none is taken to read a tensor of its own.
        """
        return ()

    def left_out(self) -> dict[str, str]:
        """What no recipe may quantize, though it has a quantized form: paths, of layers or of modules that hold them,
        and for each the reason. Empty where there is nothing.
        """
        return {}

    def layers(self) -> dict[str, nn.Module]:
        """The full-precision layers that a recipe may quantize, of every kind, by path, in the order of the module
        tree: Linears, convolutions, embeddings, the switch layers of experts. A recipe takes embeddings only where it
        asks for them.
        """
        out = tuple(self.left_out())
        found = find_exact_layers(self.module)
        return {path: layer for path, layer in found.items() if not any(is_at(path, prefix) for prefix in out)}

    def block_linears(self) -> dict[str, nn.Linear]:
        """Those of ``layers`` that are Linears and belong to a block."""
        blocks = self.blocks
        found = self.layers().items()
        return {p: m for p, m in found if isinstance(m, nn.Linear) and any(block.owns(p) for block in blocks)}

    def roles(self) -> dict[str, Role]:
        """The role of each of ``layers``, by path: what a recipe plans from. An embedding's is "embedding".

        Raises:
            AdapterError: One of them is no word, or another layer's is "embedding"; it names the layer.
        """
        found = {}
        for path, layer in self.layers().items():
            table = isinstance(layer, nn.Embedding)
            try:
                found[path] = Role(EMBEDDING if table else self.role(path))
            except AdapterError as error:
                raise AdapterError(f"{self.name}, layer {path}: {error}") from error
            if found[path] == EMBEDDING and not table:
                raise AdapterError(f"{self.name}, layer {path}: {EMBEDDING!r} is the role of embeddings alone")
        return found

    def counts(self, stage: Stage, key: str) -> float:
        """How much a tensor counts in the error of the stage that writes it, beside the others that it writes: all
        alike where an adapter does not say. Errors that are weighed by what they change in the prediction
        (``sensitivity``) need no such weights.

        Args:
            stage: One of ``stages``.
            key: What it writes; of a tensor under several keys the first.

        Returns:
            At least 0, and for one tensor of each stage more.
        """
        return 1.0

    def weights(self, stage: Stage, keys: Iterable[str]) -> dict[str, float]:
        """``counts`` of some tensors that a stage writes.

        Args:
            stage: One of ``stages``.
            keys: The tensors.

        Raises:
            AdapterError: One of them is no weight, or all are 0.
        """
        found = {key: float(self.counts(stage, key)) for key in keys}
        if any(not 0 <= weight < np.inf for weight in found.values()) or (found and not any(found.values())):
            raise AdapterError(
                f"{self.name}: what stage {stage.name} writes counts {found}; expected numbers of at least 0, one of"
                " them above"
            )
        return found

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
        require_finite(self.module, self.name)

    def rows_in(self, state: State) -> int:
        """How many samples a state is of."""
        return next(iter(state.values())).shape[0]

    def take(self, state: State, rows: slice) -> State:
        """Some of a state's samples."""
        return {key: value[rows] for key, value in state.items()}

    def joined(self, states: Sequence[State]) -> State:
        """The samples of several states in one."""
        return {key: mx.concatenate([state[key] for state in states]) for key in states[0]}

    def level_weights(self, sigmas: Sequence[float] | Array) -> Array:
        """What a unit of squared error of a prediction costs at noise levels.

        Args:
            sigmas: [T] in [0,1].

        Returns:
            Factors [T], relative to the mean over all levels.
        """
        return np.ones(len(sigmas))

    def judged(self, signs: State) -> State:
        """Signs [..] in the shapes of what the model predicts, with 0 for what of a prediction nobody uses."""
        return signs

    def weighed(self, signs: State, predicted: State) -> State:
        """Of random ``signs`` [..] vectors whose outer product is on average the Hessian of what an error of what is
        ``predicted`` costs, times the numbers of a place of it: the signs, where squared errors count."""
        return signs

    def exactly(self) -> AbstractContextManager[object]:
        """Around a forward pass of the full-precision stream while earlier stages are quantized already: for hosts
        whose stages run anything of those again.
        """
        return nullcontext()

    def run(self, state: State, sigma: float | Array) -> State:
        """Send a state through the whole chain.

        Args:
            state: What enters the first stage.
            sigma: The noise level, or one for each sample [B].

        Returns:
            What leaves the last stage, evaluated.
        """
        with self.clock.at(sigma):
            for stage in self.stages:
                state = self._hooks.get(stage.name, stage.run)(state)
            mx.eval(state)
        return state


@contextmanager
def hooked(adapter: Adapter, names: Iterable[str], observe: Observe) -> Iterator[None]:
    """Show what enters and leaves some stages in the forward passes of ``Adapter.run`` inside. The hooks are gone
    afterwards, also after an exception.

    Args:
        adapter: The model.
        names: Of the stages to watch.
        observe: Called as ``observe(name, inputs, outputs)``. The states are not evaluated yet: an observer keeps what
            it needs and evaluates everything at once.

    Raises:
        AdapterError: The model does not have one of the stages.
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
