"""The contract between a model and everything else. Methods see arrays, the sweep sees stages, and only an adapter knows its host.

A model is a chain of stages (embedders, blocks, head) that pass a state from one to the next; the chain equals the model. That is
all a block-by-block quantizer needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .. import artifacts
from ..array_memory import ArrayMemory
from ..errors import AdapterError, NumericsError
from ..prompts import Prompt
from ..rewrite import find_linears, parameters
from ..sampler import Conditioning, SamplerStep, sample, seeded_noise
from ..schedule import Clock, Sigmas, flow_sigmas
from .attention import SoftmaxAttention, find_attentions

State = dict[str, mx.array]
_digest = ArrayMemory(artifacts.array_digest)


def written(outputs: State, inputs: State) -> list[str]:
    """What a stage wrote: the keys of its outputs whose array is not the very object that came in."""
    return [key for key, value in outputs.items() if inputs.get(key) is not value]


@dataclass(frozen=True)
class Stage:
    """One link of the chain: ``run`` maps state to state and uses only modules below ``prefixes``. Blocks, the links between the first
    and the last, pass on what they do not know.
    """

    name: str
    prefixes: tuple[str, ...]
    run: Callable[[State], State]

    def owns(self, path: str) -> bool:
        return any(path == prefix or path.startswith(prefix + ".") for prefix in self.prefixes)


Observe = Callable[[str, State, State], None]


class StageHook:
    """Shows the state before and after one stage to an observer and passes it on. It stands in for the stage's ``run``, outside of the
    module tree: not an ``nn.Module``, so parameters and paths are the same while it is there.
    """

    def __init__(self, name: str, run: Callable[[State], State], observe: Observe):
        self._name, self._run, self._observe = name, run, observe

    def __call__(self, state: State) -> State:
        outputs = self._run(state)
        self._observe(self._name, state, outputs)
        return outputs


@dataclass(frozen=True)
class Fold:
    """Rows ``start`` to ``stop`` of the Linear at ``path`` write the channels of an edge; with ``plus_one`` they are used as 1 + y."""

    path: str
    start: int
    stop: int
    plus_one: bool = False


@dataclass(frozen=True)
class Edge:
    """``consumers`` read one and the same tensor. Where ``folds`` are given, its channels can be divided by any positive vector by
    changing those producers alone; where there are none, whoever wants to divide has to do it while the model runs. Inside of runs of
    ``mixes`` channels (1: none) the producers can absorb any linear mixing as well. ``reorders`` are producers whose rows are the
    tensor's channels up to a nonlinearity, so that its channels can be put in any order. ``after`` names the nonlinearity that wrote
    the tensor, such as "gelu", and with it the skew of what is in it.
    """

    consumers: tuple[str, ...]
    folds: tuple[Fold, ...] = ()
    after: str = ""
    mixes: int = 1
    reorders: tuple[Fold, ...] = ()


class Adapter(ABC):
    """A diffusion model, seen from the outside. Subclasses fill in the abstract members; the rest follows from them."""

    name: str  # as on the command line
    module: nn.Module  # the tree that holds every parameter that is saved
    clock: Clock  # set around every forward pass
    shift: float = 1.0  # of the noise schedule
    steps: int = 28  # default number of sampler steps
    cfg: float = 1.0  # default guidance
    batch: int = 16  # pictures that are sampled at once
    samples: int | None = None  # default number of (picture, step) pairs that calibrate a sweep; None takes all
    rows: int = 16  # of a batch that one backward pass through a block may have
    latent_shape: tuple[int, int, int]  # H, W, C
    place: str = ""  # where weights that ``module`` does not hold come from: a folder, a hub id, or "" for the usual one
    _hooks: Mapping[str, StageHook] = MappingProxyType({})  # by stage, set by ``hooked``

    @property
    def size(self) -> int:
        """Pixels of a picture's side; here for models whose latents are pixels."""
        return self.latent_shape[0]

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The chain, from {latent, tokens, pooled, t} to {velocity}."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning of prompts; the empty prompt is the unconditional one."""

    def prepare(self, prompts: Iterable[Prompt]) -> None:
        """Encode prompts, and the empty one, all at once: an adapter that remembers them reads heavy text encoders only here."""
        self.encode([*dict.fromkeys(prompt.text for prompt in prompts), ""])

    @abstractmethod
    def decode(self, latent: mx.array) -> npt.NDArray[np.float32]:
        """Latents [B,H,W,C] to pictures [B,height,width,3] in [0,1]."""

    @abstractmethod
    def role(self, path: str) -> str:
        """What a Linear is for: attention, mlp, modulation, embedder or output."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain data from which ``blank`` rebuilds the structure (without weights)."""

    @classmethod
    @abstractmethod
    def blank(cls, description: dict[str, Any]) -> Adapter:
        """The same structure with unspecified weights, for loading."""

    def twin(self) -> Adapter:
        """The same structure with unspecified weights; what is outside of ``module`` is shared."""
        return type(self).blank(self.describe())

    def resize(self, size: int) -> None:
        """Draw pictures of this many pixels a side from now on; AdapterError where the model cannot."""
        raise AdapterError(f"{self.name} draws pictures of one size only; leave --size out")

    @abstractmethod
    def prompts(self, purpose: str, count: int, seed: int = 0) -> list[Prompt]:
        """The model's own prompts for "calibration" or "evaluation", disjoint; ``seed`` shifts the noise seeds."""

    def attributes(self, images: npt.NDArray[Any], prompts: Sequence[str]) -> dict[str, float] | None:
        """Share of prompt attributes that the pictures obey, where the model can tell; ``mean`` is over all of them."""
        return None

    def edges(self) -> tuple[Edge, ...]:
        """Which layers read the same tensor, and what can be folded into what wrote it. Each layer is in at most one edge."""
        return ()

    def linears(self) -> dict[str, nn.Linear]:
        return find_linears(self.module)

    def attentions(self) -> dict[str, SoftmaxAttention]:
        """The attentions that can be opened, by path: ``set_module`` may put a ``QuantizedAttention`` there. Empty where it has none."""
        return find_attentions(self.module)

    @property
    def fingerprint(self) -> str:
        """sha256 over all parameters; an array is hashed again only when it is another or has changed."""
        return artifacts.digest({name: _digest(value) for name, value in parameters(self.module).items()})

    def check_finite(self) -> None:
        """Raise NumericsError, naming the tensor, when a parameter holds NaN or infinity."""
        for name, value in parameters(self.module).items():
            if mx.issubdtype(value.dtype, mx.floating) and not bool(mx.isfinite(value).all().item()):
                bad = int(np.array((~mx.isfinite(value)).sum()))
                raise NumericsError(
                    f"{self.name}: parameter {name} holds {bad} NaN or infinite values of {value.size}; repair the checkpoint"
                )

    def sigmas(self, steps: int) -> Sigmas:
        return flow_sigmas(steps, self.shift)

    def state(self, latent: mx.array, tokens: mx.array, pooled: mx.array, sigma: float | npt.NDArray[Any]) -> State:
        """The chain's input; sigma is one number, or one for each sample."""
        t = mx.broadcast_to(mx.array(np.float32(1000) * np.asarray(sigma, np.float32)), (latent.shape[0],))
        return {"latent": latent, "tokens": tokens, "pooled": pooled, "t": t}

    def velocity(self, latent: mx.array, tokens: mx.array, pooled: mx.array, sigma: float | npt.NDArray[Any]) -> mx.array:
        """The model's prediction of ``noise - image`` [B,H,W,C]."""
        state = self.state(latent, tokens, pooled, sigma)
        with self.clock.at(sigma):
            for stage in self.stages:
                state = self._hooks.get(stage.name, stage.run)(state)
            mx.eval(state)
        return state["velocity"]

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        cfg: float | None = None,
        callback: Callable[[SamplerStep], None] | None = None,
    ) -> mx.array:
        """Sample latents [B,H,W,C] for prompts, one seed each; see ``sampler.sample``."""
        if len(prompts) != len(seeds) or not prompts:
            raise AdapterError(f"expected one seed for each of at least one prompt, found {len(prompts)} prompts and {len(seeds)} seeds")
        noise = seeded_noise(seeds, self.latent_shape)
        text, empty = self.encode(prompts), self.encode([""] * len(prompts))
        sigmas = self.sigmas(self.steps if steps is None else steps)
        return sample(self.velocity, noise, sigmas, text, empty, self.cfg if cfg is None else cfg, callback)


@contextmanager
def hooked(adapter: Adapter, names: Iterable[str], observe: Observe) -> Iterator[None]:
    """Call ``observe(name, inputs, outputs)`` for each of these stages in the calls of ``adapter.velocity`` inside.

    The states are not evaluated yet; an observer keeps what it needs and evaluates everything at once. The hooks are gone afterwards,
    also after an exception. Raises AdapterError on a stage that the model does not have.
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
