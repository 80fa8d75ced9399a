"""Mixed precision: bits where errors change the prediction most for what they cost.

One pass over the full-precision model sees every layer's inputs and measures how much an error in each of its outputs
changes the velocity (``sensitivity``). With that, what a layer's weight loses at so many bits has the same unit in all
layers, and so has what its input loses; bytes and bits go where they buy most. What comes out is a recipe like any
other, with one rule a layer.

Errors of different layers, tokens and channels are taken as small and independent, and transforms, low-rank branches
and learned codes are left out of account: all that matters is how layers compare. This is the allocation of HAWQ-V2
(arXiv 1911.03852, eq. 2.11) with the Gauss-Newton diagonal in place of the Hessian's trace, each output at its own
cost, and the error of a layer's output in place of that of its weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.data import CalibrationData
from ..errors import NumericsError, RecipeError
from ..files.parameters import compact
from ..layers.sizes import planned_layer_bytes
from ..methods.inputs.tiers import TIERS
from ..models.adapter import Adapter
from ..numerics import knapsack
from ..numerics.arrays import Array
from ..progress import Progress, silent
from ..recipes.recipe import LayerSpec, Recipe
from .inputs import tiers_of
from .planning import planned
from .survey import Option, Survey, survey

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits of a weight that MLX's kernels read
PINNED, LEAST = 8, 4  # a layer that a recipe gives 8 bits keeps them; one of a careful role has at least 4
FULL_PRECISION = "full precision"


@dataclass(frozen=True)
class Allocation:
    """A recipe with one rule a layer, the ``plan`` that those rules are, and as plain data how it came about; see
    ``allocate``.
    """

    recipe: Recipe
    plan: dict[str, LayerSpec]
    facts: dict[str, Any]


def allocate(
    adapter: Adapter,
    calibration: CalibrationData,
    recipe: Recipe,
    bits_per_weight: float | None = None,
    bits_per_activation: float | None = None,
    widths: Sequence[int] = WIDTHS,
    progress: Progress = silent,
    work: Path | None = None,
    plan: Mapping[str, LayerSpec] | None = None,
) -> Allocation:
    """``recipe`` with other bits in each layer, those with the least predicted velocity error; None leaves weights or
    inputs as they are.

    ``bits_per_weight`` limits what is stored by weight of the quantized layers, scales, biases and branches included:
    the model's ``Size.bits_per_quantized_weight`` will not be more, but for divisors that transforms may add. What a
    recipe keeps in full precision is not counted. Layers to which it gives fewer than 8 bits get one of ``widths``, in
    its own format. So do those of careful roles (modulation, embedders, output), but at least 4 bits, or all: 8 are
    safe where nobody knows, too many for modulation and too few for a last layer. Other layers of 8 bits keep them.

    ``bits_per_activation`` is an average over quantized inputs and noise levels. An input counts by the
    multiply-accumulates that read it, for arithmetic is all that its bits cost: it is never stored. Each layer gets its
    own ``ActivationSpec.budget``, so it takes bits at each noise level for what the quantized model really sees there;
    the average is met exactly on full-precision inputs.

    ``plan`` is what the recipe means for each layer, where that is known already. The result has the new one.

    Facts: ``layers`` by path, each with its weight format, ``bytes`` and predicted ``error``, and ``activation``, the
    mean bits of its input, with ``input_error``; in all ``error``, ``error_before`` (of the recipe's own weights),
    ``input_error``, and what is reached of both limits. Deterministic; with ``work``, a folder, a killed run resumes
    there. Raises RecipeError, before anything long starts, where a limit cannot be met.
    """
    layers = adapter.layers()
    plan = planned(adapter, recipe) if plan is None else plan
    formats = candidates(adapter, plan, widths)
    sizes = candidate_bytes(adapter, plan, widths)
    count = sum(layers[path].weight.size for path in plan)
    check_limits(adapter, recipe, plan, bits_per_weight, bits_per_activation, widths)
    by_input = bits_per_activation is not None
    surveys = survey(adapter, calibration, plan, formats, by_input, progress, work, recipe.range_batch)

    before = {path: formats[path].index(spec.weight) for path, spec in plan.items()}
    chosen = before
    if bits_per_weight is not None:
        found = knapsack.least_cost(
            [surveys[path].weight for path in plan], list(sizes.values()), bits_per_weight * count / 8
        )
        chosen = dict(zip(plan, found, strict=True))
    options = {path: formats[path][at] for path, at in chosen.items()}
    specs = {path: replace(plan[path], weight=form) for path, form in options.items() if form is not None}
    report: dict[str, dict[str, Any]] = {
        path: {
            "weight": FULL_PRECISION if form is None else str(form),
            "bytes": int(sizes[path][chosen[path]]),
            "error": float(surveys[path].weight[chosen[path]]),
        }
        for path, form in options.items()
    }
    facts: dict[str, Any] = {
        "error": sum(row["error"] for row in report.values()),
        "error_before": float(sum(surveys[path].weight[before[path]] for path in plan)),
        "bits_per_weight": 8 * sum(row["bytes"] for row in report.values()) / count,
        "layers": report,
    }
    if any(one.by_blocks for one in surveys.values()):
        facts["weighed"] = "block errors"
    if bits_per_activation is not None:
        specs, inputs = limit_inputs(specs, surveys, bits_per_activation)
        for path, row in inputs.items():
            report[path] |= row
        works = [surveys[path].work for path in inputs]
        facts["bits_per_activation"] = float(np.average([row["activation"] for row in inputs.values()], weights=works))
        facts["input_error"] = sum(row["input_error"] for row in inputs.values())
    sensitivity = recipe.sensitivity or bits_per_activation is not None  # budgets are of the velocity's error
    rules = tuple((path, specs.get(path)) for path in options)
    return Allocation(replace(recipe, rules=rules, sensitivity=sensitivity), specs, facts)


def candidates(adapter: Adapter, plan: Mapping[str, LayerSpec], widths: Sequence[int]) -> dict[str, list[Option]]:
    """What each layer's weight may be, by ascending bits; its own format is one of them."""
    roles, found = adapter.roles(), dict[str, list[Option]]()
    for path, spec in plan.items():
        own, careful = spec.weight.bits, roles[path].careful
        some = [own] if own >= PINNED and not careful else sorted({own, *widths})
        found[path] = [replace(spec.weight, bits=bits) for bits in some if bits >= LEAST or bits == own or not careful]
        found[path] += [None] if own >= PINNED and careful else []
    return found


def candidate_bytes(adapter: Adapter, plan: Mapping[str, LayerSpec], widths: Sequence[int]) -> dict[str, Array]:
    """Bytes of each layer in each of its ``candidates``, ascending; raises NumericsError, naming the layer, on weights
    that are not finite.
    """
    layers, found = adapter.layers(), dict[str, Array]()
    for path, forms in candidates(adapter, plan, widths).items():
        layer, spec = layers[path], plan[path]
        try:
            sizes = [
                compact(layer.weight).nbytes  # as it is stored
                if form is None
                else planned_layer_bytes(replace(spec, weight=form), layer)
                for form in forms
            ]
        except NumericsError as error:
            raise NumericsError(f"layer {path}: {error}") from error
        found[path] = np.maximum.accumulate(
            sizes
        )  # where scales are too large for float16, those of fewer bits are first
    return found


def check_limits(
    adapter: Adapter,
    recipe: Recipe,
    plan: Mapping[str, LayerSpec],
    bits_per_weight: float | None,
    bits_per_activation: float | None,
    widths: Sequence[int] = WIDTHS,
) -> None:
    """Raise RecipeError where a limit is below the least possible."""
    if bits_per_weight is not None:
        sizes, layers = list(candidate_bytes(adapter, plan, widths).values()), adapter.layers()
        count = sum(layers[path].weight.size for path in plan)
        least, most = (8 * sum(int(size[end]) for size in sizes) / count for end in (0, -1))
        if not bits_per_weight >= least:
            raise RecipeError(
                f"recipe {recipe.name}: {bits_per_weight:g} bits per weight cannot be met; its {len(plan)} layers take"
                f" {least:.3f} to {most:.3f} with their scales; ask for more, or give large layers fewer bits by an"
                " override"
            )
    if bits_per_activation is None:
        return
    tiers = [tiers_of(spec.activation) for spec in plan.values() if spec.activation is not None]
    if not tiers:
        raise RecipeError(
            f"recipe {recipe.name} quantizes no inputs; an average of {bits_per_activation:g} bits needs one with a8,"
            " a6 or a4"
        )
    if not bits_per_activation >= min(TIERS):
        raise RecipeError(
            f"recipe {recipe.name}: {bits_per_activation:g} bits per activation cannot be met; inputs take {min(TIERS)}"
            f" to {max(map(max, tiers))}"
        )


def limit_inputs(
    specs: Mapping[str, LayerSpec], surveys: Mapping[str, Survey], average: float
) -> tuple[dict[str, LayerSpec], dict[str, dict[str, float]]]:
    """Specifications with the error budgets that let inputs have ``average`` bits; and what each quantized input then
    has.
    """
    wanted = {path: spec.activation for path, spec in specs.items() if spec.activation is not None}
    errors = {path: found for path in wanted if (found := surveys[path].input) is not None}
    tiers = {path: tiers_of(spec) for path, spec in wanted.items()}
    works = np.array([surveys[path].work for path in wanted])
    shares = dict(zip(wanted, (works / works.sum()).tolist(), strict=True))
    unit = knapsack.shared_budget(list(errors.values()), list(tiers.values()), list(shares.values()), average)
    done, facts = dict(specs), dict[str, dict[str, float]]()
    for path, spec in wanted.items():
        budget = max(unit * shares[path], float(np.finfo(np.float32).tiny))
        bits = knapsack.fewest_bits(errors[path], tiers[path], budget)
        taken = errors[path][np.searchsorted(tiers[path], bits), np.arange(len(bits))]
        done[path] = replace(specs[path], activation=replace(spec, budget=budget))
        facts[path] = {"activation": float(bits.mean()), "input_error": float(taken.mean())}
    return done, facts
