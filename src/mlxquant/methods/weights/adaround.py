"""AdaRound: learn for every weight whether to round it down or up (arXiv 2004.10568), by what a whole block then writes
(2102.05426).

Every weight chooses between two codes; ``h(alpha)`` in [0,1] is the soft choice, and a regulariser whose exponent is
annealed makes it hard. What is minimised comes as a function of the soft weights, so this file knows neither blocks nor
models.

Departures from the papers: the reconstruction error is divided by what the start of the search has, and the regulariser
is averaged over the weights, so that ``pressure`` means the same for every block (as sums, the regulariser of a block
of 57 M weights outweighs the reconstruction by eight orders of magnitude, and the result is rounding to nearest); the
choice may start from another method's codes, such as GPTQ's; and it stops when nothing moves any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from ...errors import NumericsError, RecipeError
from ...grids.weights import Grid
from ...numerics.arrays import Array
from ...progress import Progress, silent
from ..registry import Citation, register

ZETA, GAMMA = 1.1, -0.1  # the stretched sigmoid reaches 0 and 1 at finite alpha (eq. 23)
SHARP, BLUNT = 20.0, 2.0  # the regulariser's exponent b is annealed from the first to the second


ADAROUND = Citation(
    "adaround",
    """@inproceedings{nagel2020adaround,
  title = {Up or Down? {A}daptive Rounding for Post-Training Quantization},
  author = {Nagel, Markus and Amjad, Rana Ali and van Baalen, Mart and Louizos, Christos and Blankevoort, Tijmen},
  booktitle = {International Conference on Machine Learning},
  year = {2020},
  note = {arXiv:2004.10568}
}""",
)


def h(alpha: mx.array) -> mx.array:
    """The rectified sigmoid ``clip((zeta - gamma) sigmoid(alpha) + gamma, 0, 1)``: how far up a weight is rounded (eq.
    23).
    """
    return mx.clip(mx.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def alpha_of(fraction: Array) -> Array:
    """The inverse of ``h`` on [0, 1]: float32, finite at both ends."""
    inside = (np.clip(fraction, 0, 1) - GAMMA) / (ZETA - GAMMA)
    return np.asarray(np.log(inside / (1 - inside)), np.float32)


def regulariser(alpha: mx.array, b: mx.array) -> mx.array:
    """``1 - |2 h(alpha) - 1|^b`` element by element (eq. 24): 0 where the choice is made, 1 where it is open."""
    return 1 - mx.abs(2 * h(alpha) - 1) ** b


def exponent(progress: float, warmup: float) -> float:
    """b at ``progress`` [0,1] of the run: ``SHARP`` until ``warmup`` is over, then linearly down to ``BLUNT``."""
    after = max(0.0, (progress - warmup) / (1 - warmup)) if warmup < 1 else 0.0
    return SHARP + (BLUNT - SHARP) * after


@dataclass(frozen=True)
class Choice:
    """For every weight [out,in] the code below, ``base`` uint8 (the other choice is the next one up), and where to
    start, ``alpha``.
    """

    base: Array
    alpha: Array

    def codes(self, alpha: Array, grid: Grid) -> Array:
        """The hard choice, ``alpha >= 0`` is up: codes uint8 [out,in]."""
        return np.minimum(self.base.astype(np.int32) + (alpha >= 0), grid.format.levels - 1).astype(np.uint8)


def choose(weight: Array, grid: Grid, start: Array | None = None, trust: float = 0.5) -> Choice:
    """The two codes around every weight [out,in], and alphas at which the soft weight is the weight itself (section 4).

    With ``start``, codes uint8 [out,in] of another method such as GPTQ, the choice is between each such code and its
    neighbour on the weight's side, and alpha starts on the side of that code: ``trust`` of the way from the boundary
    between the two choices to the code itself, or further where the weight is nearer to it. A start of nearest codes
    leaves the soft weight as it is without.
    """
    scales, biases = (grid.expand(v, weight.shape[1]).astype(np.float64) for v in (grid.scales, grid.biases))
    top = grid.format.levels - 1
    place = np.clip((weight - biases) / scales, 0, top)
    if start is None:
        base = np.minimum(np.floor(place), top - 1)
        return Choice(base.astype(np.uint8), alpha_of(place - base))
    chosen = start.astype(np.float64)
    base = np.clip(np.where(place >= chosen, chosen, chosen - 1), 0, top - 1)
    up = chosen > base
    fraction = np.clip(place - base, 0, 1)
    edge = 0.5 + trust / 2
    return Choice(
        base.astype(np.uint8), alpha_of(np.where(up, np.maximum(fraction, edge), np.minimum(fraction, 1 - edge)))
    )


QDROP = Citation(
    "qdrop",
    """@inproceedings{wei2022qdrop,
  title = {{QDrop}: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization},
  author = {Wei, Xiuying and Gong, Ruihao and Li, Yuhang and Liu, Xianglong and Yu, Fengwei},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  note = {arXiv:2203.05740}
}""",
)


@dataclass(frozen=True)
class Settings:
    """How long and how hard to learn.

    ``iterations`` of Adam with learning rate ``rate``, each on ``batch`` samples of mixed timesteps, or on as many as
    the model allows; ``pressure`` is the weight of the regulariser, which is off for the first ``warmup`` share;
    ``trust`` as in ``choose``; ``drop`` is QDrop's probability (2203.05740) that an activation is left unquantized;
    ``patience`` iterations without a change of any code end the run once all choices are made.
    """

    iterations: int = 1000
    batch: int = 16
    rate: float = 0.02
    pressure: float = 1000.0
    warmup: float = 0.2
    trust: float = 0.5
    drop: float = 0.0
    seed: int = 0
    patience: int = 50

    def __post_init__(self) -> None:
        ranges = {
            "iterations": self.iterations >= 1, "batch": self.batch >= 1, "rate": self.rate > 0,
            "pressure": self.pressure >= 0,
            "warmup": 0 <= self.warmup <= 1, "trust": 0 <= self.trust <= 1, "drop": 0 <= self.drop <= 1,
            "patience": self.patience >= 1,
        }  # fmt: skip
        for name, fine in ranges.items():
            if not fine:
                raise RecipeError(f"AdaRound: {name} = {getattr(self, name)} is out of range")


class Checkpoint(Protocol):
    """Where a run that was killed finds how far it had come; it says itself when it is time to save again."""

    @property
    def due(self) -> bool: ...

    def load(self) -> tuple[dict[str, mx.array], dict[str, Any]] | None: ...

    def save(self, arrays: dict[str, mx.array], facts: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Learned:
    """Codes uint8 [out,in] by name, and what the run has to say about itself."""

    codes: dict[str, Array]
    facts: dict[str, Any]


EVERY = 25  # iterations between looks at the choices, at the clock and, where there is one, at the checkpoint
OPEN = 0.02  # a choice is made when h is this close to 0 or 1


@register(
    "reconstruct", "adaround", citation=ADAROUND, summary="learn the rounding of a block by what the block writes"
)
def adaround(
    loss: Callable[..., mx.array],
    choices: Mapping[str, Choice],
    grids: Mapping[str, Grid],
    minibatch: Callable[[int], tuple[Any, ...]],
    settings: Settings,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
    label: str = "adaround",
) -> Learned:
    """Learn codes for some weights together.

    ``loss(weights, *minibatch(i))`` is the reconstruction error of iteration i as a scalar, about 1 where the search
    starts, for soft weights [out,in] float32 by name; ``minibatch(i)`` depends on i alone. Everything is float32. A run
    that resumes from a ``checkpoint`` ends with the same codes, bit for bit. Raises NumericsError when the loss is not
    finite.
    """
    tops = {name: float(grid.format.levels - 1) for name, grid in grids.items()}
    bases = {name: mx.array(choice.base) for name, choice in choices.items()}
    expanded = {
        n: [mx.array(g.expand(v, choices[n].base.shape[1])) for v in (g.scales, g.biases)] for n, g in grids.items()
    }
    count = sum(choice.base.size for choice in choices.values())
    held = {"alpha": {name: mx.array(choice.alpha) for name, choice in choices.items()}}
    adam = optim.Adam(learning_rate=settings.rate, bias_correction=True)
    adam.init(held["alpha"])

    def objective(
        alphas: dict[str, mx.array], b: mx.array, pressure: mx.array, *batch: Any
    ) -> tuple[mx.array, mx.array]:
        weights = {}
        for name, alpha in alphas.items():
            scale, offset = expanded[name]
            weights[name] = mx.minimum(bases[name] + h(alpha), tops[name]) * scale + offset
        error = loss(weights, *batch)
        open_share = mx.array(0.0)
        for alpha in alphas.values():
            open_share = open_share + regulariser(alpha, b).sum() / count
        return error + pressure * open_share, error

    gradient = mx.value_and_grad(objective)

    def step(b: mx.array, pressure: mx.array, *batch: Any) -> mx.array:
        (_, error), slopes = gradient(held["alpha"], b, pressure, *batch)
        held["alpha"] = adam.apply_gradients(slopes, held["alpha"])
        return error

    first, quiet, losses = 0, 0, list[float]()
    sides = {name: np.asarray(choice.alpha >= 0) for name, choice in choices.items()}
    if checkpoint is not None and (kept := checkpoint.load()) is not None:
        arrays, facts = kept
        held["alpha"] = {name: arrays[f"alpha/{name}"] for name in choices}
        for name in choices:
            adam.state[name] = {moment: arrays[f"{moment}/{name}"] for moment in ("m", "v")}
        adam.state["step"] = arrays["step"]
        first, quiet, losses = facts["iteration"], facts["quiet"], facts["losses"]
        sides = {name: np.array(alpha) >= 0 for name, alpha in held["alpha"].items()}
    state = [held, adam.state]
    step = mx.compile(step, inputs=state, outputs=state)

    def undecided() -> int:
        softs = (np.array(h(alpha)) for alpha in held["alpha"].values())
        return sum(int(((soft > OPEN) & (soft < 1 - OPEN)).sum()) for soft in softs)

    done = first
    for i in progress(range(first, settings.iterations), label):
        share = i / settings.iterations
        pressure = settings.pressure if share >= settings.warmup else 0.0
        error = step(mx.array(exponent(share, settings.warmup)), mx.array(pressure), *minibatch(i))
        mx.eval(state, error)
        done = i + 1
        if done % EVERY and done < settings.iterations:
            continue
        losses = [*losses, float(np.array(error))]
        if not np.isfinite(losses[-1]):
            raise NumericsError(f"{label}: the loss of iteration {i} is {losses[-1]}; use a smaller learning rate")
        alphas = {name: np.array(alpha) for name, alpha in held["alpha"].items()}
        still = all(np.array_equal(alpha >= 0, sides[name]) for name, alpha in alphas.items())
        sides = {name: alpha >= 0 for name, alpha in alphas.items()}
        quiet = quiet + EVERY if still and undecided() == 0 else 0
        if quiet >= settings.patience:
            break
        if checkpoint is not None and checkpoint.due:
            flat = {f"{moment}/{name}": adam.state[name][moment] for name in choices for moment in ("m", "v")}
            flat |= {f"alpha/{name}": alpha for name, alpha in held["alpha"].items()}
            checkpoint.save({**flat, "step": adam.state["step"]}, {"iteration": done, "quiet": quiet, "losses": losses})
    codes = {name: choices[name].codes(np.array(held["alpha"][name]), grids[name]) for name in choices}
    return Learned(codes, {"iterations": done, "loss": losses[-1], "open": undecided() / count})
