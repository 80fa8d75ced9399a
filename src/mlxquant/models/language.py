"""Language models as adapters: a chain from tokens to logits, cut between the layers of any model that has ``layers``.

Models of a hundred families call their layers in a hundred ways: with masks, windows, positions, caches. Nobody has to
say how. The model itself is run with stand-ins in the places of its layers, and the stand-ins see what it does:

- ``embed`` runs the model with layers that pass the hidden states on and remember what else they are given. What
  enters the first one is what the embedding has written.
- Each block is a layer, called as its stand-in was called when the model read the same tokens.
- ``head`` runs the model with a first layer that returns the hidden states of the last one, and with the others
  passing them on: what follows are the last norm and the output layer, however the model has them.

MLX computes only what is asked for, so what the stand-ins cut off costs nothing.

This is right where a model does nothing between its layers but to hand the hidden states on. ``check_chain`` compares
with the model itself and refuses others (``quantize_linears`` still takes them). Hidden states are float32 from the
first layer on, whatever the weights are, so that errors are measured finer than they are made.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..errors import AdapterError, CalibrationError
from ..grids.time import Clock
from ..layers.kinds import find_exact_layers
from ..layers.tree import StandIn, get_module, parameters, swapped, tapped
from .adapter import Adapter
from .stages import Stage, State

NO_TIME = 0.0  # the noise level of a model that has none
JUDGED = 2**22  # logits of a window that the last stage writes; of larger vocabularies it judges every n-th token
ROUTERS = ("gate", "router")  # layers that choose experts: an error there sends a token elsewhere
Tokens = npt.NDArray[np.int32]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a layer, beside the hidden states: masks, mostly


class Tokenizer(Protocol):
    """Text to tokens int32 [n] and back."""

    def encode(self, text: str) -> Tokens: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class PassedOn(StandIn):
    """Returns the hidden states as they are and remembers what else it was given."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self._given: Arguments = ((), {})

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self._hidden, self._given = x, (args, kwargs)
        return x


class Given(StandIn):
    """Returns hidden states that it was made with."""

    def __init__(self, layer: nn.Module, hidden: mx.array):
        super().__init__(layer)
        self._hidden = hidden

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return self._hidden


class LanguageAdapter(Adapter):
    """A model that predicts the next token. Its chain leads from {tokens int32 [B,T]} through {tokens, hidden float32
    [B,T,D]} to {logits float32 [B,T,V]}. A sample is a window of text.

    Attributes:
        context: Tokens of a window where nobody says.
        longest: Tokens of a window that the model has positions for; None for one without a table of positions.
    """

    draws = timed = False
    batch = 4
    samples = 64
    rows = 4
    context = 512
    longest: int | None = None

    def __init__(self, module: nn.Module):
        """Find out how ``module`` is built, a model with ``layers`` whose call maps tokens [B,T] to logits [B,T,V].

        Raises:
            AdapterError: Its layers cannot be found.
        """
        self.module, self.clock = module, Clock(NO_TIME)
        kinds = {value.dtype for value in parameters(module).values() if mx.issubdtype(value.dtype, mx.floating)}
        self._dtype = kinds.pop() if len(kinds) == 1 else mx.float32
        self._vocabulary = int(module(mx.zeros((1, 1), mx.int32)).shape[-1])  # nothing is computed
        self.layer_paths = self._find_layers()
        self._last: tuple[mx.array, list[Arguments]] | None = None  # tokens, and what each layer is given for them
        self._stages = self._cut()

    def weighed(self, signs: State, predicted: State) -> State:
        """See ``Adapter.weighed``: by the divergence of the next token's distribution p, whose Hessian is diag(p) − ppᵀ
        (Fisher's information). With random signs r that is on average the outer product of √p r − p (√p · r).
        """
        found = State()
        for key, sign in signs.items():
            likely = mx.softmax(predicted[key].astype(mx.float32), -1)
            some = mx.sqrt(likely) * sign
            found[key] = self._vocabulary**0.5 * (some - likely * some.sum(-1, keepdims=True))
        return found

    def _find_layers(self) -> list[str]:
        """Where the layers are in the module, by identity; raises AdapterError when they cannot be found."""
        layers = list(getattr(self.module, "layers", ()))
        where = {id(module): path for path, module in self.module.named_modules()}
        if not layers or not all(id(layer) in where for layer in layers):
            raise AdapterError(
                f"{type(self.module).__module__}: a model without 'layers' cannot be quantized layer by layer; use"
                " quantize_linears"
            )
        return [where[id(layer)] for layer in layers]

    def _cut(self) -> tuple[Stage, ...]:
        outside = [
            path
            for path in find_exact_layers(self.module)
            if not any(path.startswith(f"{layer}.") for layer in self.layer_paths)
        ]
        before = self._reached_before_layers(outside) if outside else set()
        blocks = [Stage(path, (path,), partial(self._run_layer, index)) for index, path in enumerate(self.layer_paths)]
        first = Stage("embed", tuple(path for path in outside if path in before), self._embed)
        return (first, *blocks, Stage("head", tuple(path for path in outside if path not in before), self._head))

    def _reached_before_layers(self, paths: list[str]) -> set[str]:
        """Which of these layers run before the first block; tokens of any kind show that."""
        seen, reached = list[str](), set[str]()

        class Marker(PassedOn):
            def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
                reached.update(seen)
                return x

        first, *others = self.layer_paths
        stand_ins: dict[str, nn.Module] = {first: Marker(get_module(self.module, first)), **self._passing(others)}
        with tapped(self.module, paths, lambda path, *call: seen.append(path)), swapped(self.module, stand_ins):
            self.module(mx.zeros((1, 2), mx.int32))
        return reached

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back."""

    @property
    def dtype(self) -> str:
        """That of all parameters that the model had at first, float32 where they differ."""
        return str(self._dtype).removeprefix("mlx.core.")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._stages

    def role(self, path: str) -> str:
        if not any(path.startswith(f"{layer}.") for layer in self.layer_paths):
            return "embedder" if self._stages[0].owns(path) else "output"
        if path.rpartition(".")[2] in ROUTERS:
            return "modulation"
        return "attention" if "attn" in path or "attention" in path else "mlp"

    def _passing(self, paths: Iterable[str]) -> dict[str, PassedOn]:
        return {path: PassedOn(get_module(self.module, path)) for path in paths}

    def check_length(self, length: int) -> None:
        """Refuse windows that are too long: MLX would read what lies behind the table of positions.

        Args:
            length: Tokens of a window.

        Raises:
            CalibrationError: The model has fewer positions.
        """
        if self.longest is not None and length > self.longest:
            raise CalibrationError(
                f"windows of {length} tokens are longer than the {self.longest} positions of {self.name}; shorten"
                " --length"
            )

    def _embed(self, state: State) -> State:
        tokens = state["tokens"]
        self.check_length(tokens.shape[1])
        stand_ins = self._passing(self.layer_paths)
        with swapped(self.module, dict(stand_ins)):
            self.module(tokens)  # nothing of it is computed but what enters the first layer
        self._last = tokens, [stand_ins[path]._given for path in self.layer_paths]
        return {"tokens": tokens, "hidden": stand_ins[self.layer_paths[0]]._hidden.astype(mx.float32)}

    def _arguments(self, tokens: mx.array) -> list[Arguments]:
        """What each layer is given beside hidden states when the model reads these very tokens.

        Only the last ones are remembered, which is enough where a chain is run layer after layer; a sweep, which runs a
        layer batch after batch, has the model asked again, for little: nothing is computed.
        """
        if self._last is None or self._last[0] is not tokens:
            self._embed({"tokens": tokens})
        assert self._last is not None
        return self._last[1]

    def _run_layer(self, index: int, state: State) -> State:
        args, kwargs = self._arguments(state["tokens"])[index]
        hidden = get_module(self.module, self.layer_paths[index])(state["hidden"], *args, **kwargs)
        if not isinstance(hidden, mx.array):
            raise AdapterError(
                f"layer {self.layer_paths[index]} returns {type(hidden).__name__}, not hidden states; use"
                " quantize_linears"
            )
        return state | {"hidden": hidden.astype(mx.float32)}

    def _head(self, state: State) -> State:
        length = state["tokens"].shape[1]
        every = max(1, length * self._vocabulary // JUDGED)
        return {"logits": self._project(state["tokens"][:, ::every], state["hidden"][:, ::every])}

    def _project(self, tokens: mx.array, hidden: mx.array) -> mx.array:
        """Hidden states of the last layer [B,T,D] to logits float32 [B,T,V]."""
        first, *others = self.layer_paths
        with swapped(self.module, {first: Given(get_module(self.module, first), hidden), **self._passing(others)}):
            return self.module(tokens).astype(mx.float32)

    def logits(self, tokens: mx.array) -> mx.array:
        """The prediction at every token.

        Args:
            tokens: int32 [B,T].

        Returns:
            float32 [B,T,V], evaluated.

        Raises:
            CalibrationError: T is more than the model has positions for.
        """
        with self.clock.at(NO_TIME):
            return self._continued(self._embed({"tokens": tokens}))

    def _continued(self, state: State) -> mx.array:
        """Embedded tokens to logits, evaluated."""
        for stage in self.blocks:
            state = stage.run(state)
        logits = self._project(state["tokens"], state["hidden"])
        mx.eval(logits)
        return logits

    def check_chain(self, tokens: mx.array) -> None:
        """Compare the chain with the model itself.

        Args:
            tokens: int32 [B,T], of any text.

        Raises:
            AdapterError: Their logits differ by more than the precision of weights explains.
        """
        with self.clock.at(NO_TIME):
            chain, whole = self._continued(self._embed({"tokens": tokens})), self.module(tokens).astype(mx.float32)
        error = float(np.array(mx.abs(chain - whole).max() / mx.maximum(mx.abs(whole).max(), 1e-9)))
        if not error < 0.05:
            raise AdapterError(
                f"{self.name}: the model does more between its layers than to pass hidden states on (its logits differ"
                f" by {error:.2g} from those of the layers in a row); it cannot be quantized layer by layer, use"
                " quantize_linears"
            )


def language(adapter: Adapter) -> LanguageAdapter:
    """The adapter, as one that writes text; raises AdapterError where the model draws pictures."""
    if not isinstance(adapter, LanguageAdapter):
        raise AdapterError(f"{adapter.name} writes no text; this needs a language model, such as gpt-python")
    return adapter
