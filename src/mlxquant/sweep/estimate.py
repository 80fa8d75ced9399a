"""What a sweep will take, by arithmetic, from how much the layers of a model read: memory beside its weights, and
operations.

Every number is a sum over layers of their widths and of the rows that they multiply. What is counted, and what is not,
is told in docs/mflux.md; nothing here knows a machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..curvature.factors import HELD
from ..layers.sizes import planned_bytes
from ..models.recorded.outline import Outline, Reading
from ..recipes.recipe import LayerSpec, Recipe
from ..recipes.tuning import Tuning

FLOAT32 = 4
STREAMS, BOTH = 3, 4  # copies of the hidden states, see ``sweep``; the second where rounding looks at both streams
FACTOR = 5  # bytes a number of a gram matrix: half of a float64 factor, and a quarter as float32 for the feedback
COLUMNS, PLAIN = 39, 27  # bytes a weight while it is rounded, with moments and without, as measured
TABLE = 16  # the same where nothing but the weight is known, and nothing is judged
NEAREST, SEARCH = 2000, 3000  # operations that rounding to nearest, and the search for steps, take as long as, a weight
BACKWARD, LOOKS = 4, 15  # forward passes that a step of tuning is worth; how often what is held out is looked at
GROUPS = 4  # of the layers of a block in a sequential recipe: inputs, outputs of attention, MLP's two


@dataclass(frozen=True)
class Work:
    """What quantizing a module takes beside its weights.

    Attributes:
        streams: Bytes of hidden states, of all calls, and what is kept of gradients.
        moments: Bytes of the moments of the stage that has most, and of the factors of its layers' Hessians.
        rounding: Bytes while the largest layer is rounded, and of the layers that its stage is tried with.
        forward: Operations of forward passes, in the model's own precision.
        matrices: Operations on moments and weights, in float32; those in float64 count twice.
        uncounted: What the recipe does beyond that, which nobody has counted; "" where that is nothing.
    """

    streams: int = 0
    moments: int = 0
    rounding: int = 0
    forward: int = 0
    matrices: int = 0
    uncounted: str = ""

    @property
    def nbytes(self) -> int:
        """The most of it at a time."""
        return self.streams + self.moments + self.rounding


def estimated(outline: Outline, plan: Mapping[str, LayerSpec], recipe: Recipe, calls: int) -> Work:
    """What a sweep over a module takes.

    Args:
        outline: A call of the module.
        plan: What happens to its layers, by path, of those that the call reaches.
        recipe: What the plan comes from.
        calls: How many calls go through the module, each as large as the outline's.

    Returns:
        The work.
    """
    cross = any(spec.cross for spec in plan.values())
    stages: dict[str, list[str]] = {}
    for path in plan:
        stages.setdefault(outline.layers[path].stage, []).append(path)
    moments = {stage: _moments(outline, plan, paths) for stage, paths in stages.items()}
    rounding = {stage: _rounding(outline, plan, paths) for stage, paths in stages.items()}
    fullest = max(stages, key=lambda stage: moments[stage] + rounding[stage])
    two_sided = [path for path, spec in plan.items() if _two_sided(spec)]
    gradients = min(HELD, 2 * (len(stages) + 1) * calls * outline.state * FLOAT32) if two_sided else 0
    factors = min(HELD, sum(_factors(outline.layers[path]) for path in two_sided))
    streams = (BOTH if cross else STREAMS) * calls
    if recipe.tuning is not None:  # afterwards, what enters each stage for one call
        streams = max(streams, len(stages) + 1)
    return Work(
        streams * outline.state * FLOAT32 + gradients + factors,
        moments[fullest],
        rounding[fullest],
        (_passes(plan, recipe) * calls + _tuned_passes(recipe.tuning, calls)) * outline.operations,
        sum(_operations(outline.layers[path], path, spec, calls) for path, spec in plan.items()),
        _uncounted(plan, recipe),
    )


def rounded_to_nearest(shapes: Sequence[tuple[int, int]], stored: int) -> Work:
    """What rounding matrices of these shapes to nearest takes, all of which are then in memory twice: as they are, and
    the ``stored`` bytes of what they become.
    """
    numbers = [rows * width for rows, width in shapes]
    return Work(rounding=TABLE * max(numbers) + stored, matrices=NEAREST * sum(numbers))


def _moments(outline: Outline, plan: Mapping[str, LayerSpec], paths: list[str]) -> int:
    """Bytes of the gram matrices of a stage, one for each tensor that its layers read."""
    tensors: dict[str, int] = {}
    for path in paths:
        one, spec = outline.layers[path], plan[path]
        copies = (2 if spec.cross else 1) * (2 if spec.held_out else 1)
        nbytes = one.parts * copies * FLOAT32 * one.shape[1] ** 2
        tensors[one.leader] = max(tensors.get(one.leader, 0), nbytes)
    return sum(tensors.values()) + sum(_factors(outline.layers[path]) for path in paths if _two_sided(plan[path]))


def _factors(one: Reading) -> int:
    """Bytes of what is known of a layer whose rounding is two-sided: two sketches of its factors, and its inputs."""
    outputs, inputs = one.shape
    return 0 if one.parts > 1 else FLOAT32 * (2 * outputs**2 + 3 * inputs**2)


def _two_sided(spec: LayerSpec) -> bool:
    return spec.open_ended or spec.two_sided is not None


def _rounding(outline: Outline, plan: Mapping[str, LayerSpec], paths: list[str]) -> int:
    """Bytes while a stage's largest layer is rounded, and of what its layers become, twice: as the recipe says, and to
    nearest.
    """
    largest, stored = 0, 0
    for path in paths:
        one, spec = outline.layers[path], plan[path]
        rows, width = one.shape[0] // one.parts, one.shape[1]
        own = FACTOR * width**2 + COLUMNS * rows * width if _uses_moments(spec) else PLAIN * rows * width
        own += 3 * FACTOR * rows**2 if _two_sided(spec) else 0
        largest = max(largest, own)
        stored += planned_bytes(spec, one.shape, parts=one.parts)
    return largest + 2 * stored


def _passes(plan: Mapping[str, LayerSpec], recipe: Recipe) -> int:
    """How often each call goes through a stage: in full precision, for the moments, and to judge each trial."""
    transforms = {name for spec in plan.values() for name in spec.transforms}
    cross = any(spec.cross for spec in plan.values())
    statistics = (GROUPS if recipe.sequential else 1) * (2 if cross else 1)
    trials = 2 if recipe.gate and any(spec != spec.plain for spec in plan.values()) else 1
    return 1 + statistics + trials + len(transforms) * (statistics + 1)


def _tuned_passes(tuning: Tuning | None, calls: int) -> int:
    """Forward passes of calls that tuning takes: to make targets, for each step one forward, one more and twice its
    work backward, and each time that held-out calls are looked at.
    """
    if tuning is None:
        return 0
    return calls + BACKWARD * tuning.iterations * tuning.batch + LOOKS * max(1, round(calls * tuning.held_out))


def _operations(one: Reading, path: str, spec: LayerSpec, calls: int) -> int:
    """On the moments of a layer and its weight."""
    rows, width, tokens = one.shape[0], one.shape[1], calls * one.rows
    moments = (3 if spec.cross else 1) * tokens * width**2 if one.leader == path else 0  # half of a gram is computed
    judged = 4 * rows * width**2  # errors of two trials: d H dᵀ and w H wᵀ of each row
    factor = one.parts * 2 * width**3 // 3 + 2 * rows * width**2 if _uses_moments(spec) else 0
    each = 2 * NEAREST + (SEARCH if spec.steps == "search" else 0)
    return moments + judged + factor + each * rows * width


def _uses_moments(spec: LayerSpec) -> bool:
    return spec.rounding != "rtn"


def _uncounted(plan: Mapping[str, LayerSpec], recipe: Recipe) -> str:
    """What of a recipe takes time of its own."""
    specs = plan.values()
    found = {
        "learning": any(spec.reconstruct for spec in specs),
        "refinement": any(spec.refine for spec in specs),
        "branches": any(spec.branch for spec in specs),
        "sensitivities": recipe.sensitivity,
        "the choice of a Hessian": any(map(_two_sided, specs)),
        "the allocation of bits": recipe.allocates,
        "further rounds": recipe.rounds > 1,
    }
    return ", ".join(name for name, so in found.items() if so)
