"""Choose the table of one layer's input: its bits at each noise level, its steps, and whether it is shifted.

Three ask: the sweep, by a recipe (``choose_table``); the allocation, which wants to know what each number of bits
would cost (``errors_by_tier``); and the step-by-step pipeline, by its own options and with all facts
(``decide_input``). A tier rule chooses the bits; the shift of what a GELU wrote is taken where it lowers the layer's
error. Everything that was compared is recorded, also where it was not taken. Arrays only: whoever calls this knows
which layer they are of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import RecipeError
from ..grids.tables import ActivationTable
from ..methods import registry
from ..methods.inputs.shift import centred, shifted
from ..methods.inputs.tiers import BUDGET, TIERS, OutputErrors, mixed, relative_errors, rms
from ..models.edges import After
from ..numerics.arrays import Array
from ..numerics.input_ranges import InputRanges
from ..numerics.transform import Transform
from ..recipes.recipe import ActivationSpec


@dataclass(frozen=True)
class Options:
    """How to decide.

    Attributes:
        rule: "error" or "threshold", a registered tier rule.
        budget: Of the first; see ``methods.inputs.tiers.error`` for the units.
        thresholds: Of the second: 4 bits below the first, 6 below the second.
        range: A registered range method.
        alpha: Of SmoothQuant.
        migration: Whether to try the integer migration after a GELU.
        tiers: The bits to choose among, ascending.
    """

    rule: str = "error"
    budget: float = BUDGET
    thresholds: tuple[float, float] = (6.0, 10.0)
    range: str = "extremes"
    alpha: float = 0.5
    migration: bool = False
    tiers: tuple[int, ...] = TIERS

    def __post_init__(self) -> None:
        if not (np.isfinite(self.budget) and self.budget > 0):
            raise RecipeError(f"the error budget must be a positive number, found {self.budget}")
        if not 0 < self.thresholds[0] <= self.thresholds[1] < np.inf:
            raise RecipeError(
                f"thresholds must be two positive numbers, the smaller first, found {self.thresholds}; the default is"
                " 6,10"
            )

    def tier_options(self, after_shift: bool) -> dict[str, float]:
        """Keyword arguments of the rule. A shifted input's thresholds are 5/6 and 8/10 of the others': 5 and 8 by
        default.
        """
        if self.rule == "error":
            return {"budget": self.budget}
        a4, a6 = self.thresholds
        return {"a4": a4 * 5 / 6, "a6": a6 * 8 / 10} if after_shift else {"a4": a4, "a6": a6}


@dataclass(frozen=True)
class LayerInput:
    """The input of a layer, with what makes an error in it count.

    Attributes:
        ranges: What was seen at each of T noise levels.
        weight: [out,in] float32, which reads it.
        costs: [T,out], what a unit of squared error of each output costs; None: in proportion to the outputs' energy,
            see ``methods.inputs.tiers``.
    """

    ranges: InputRanges
    weight: Array
    costs: Array | None = None

    @classmethod
    def of(cls, spec: ActivationSpec | None, ranges: InputRanges, weight: Array, costs: Array | None) -> LayerInput:
        """An input as a specification looks at it: at each noise level, or merged where one entry serves them all."""
        if spec is not None and not spec.per_timestep:
            ranges, costs = ranges.merged(), None if costs is None else costs.mean(0, keepdims=True)
        return cls(ranges, weight, costs)

    @cached_property
    def errors(self) -> OutputErrors:
        return OutputErrors(self.ranges, self.weight, self.costs)

    def divided(self, divisor: Array) -> LayerInput:
        """With input channels divided by ``divisor`` [in] and the weight's columns multiplied: the same outputs."""
        transform = Transform(divisor)
        return LayerInput(transform.ranges(self.ranges), transform.weight(self.weight), self.costs)


@dataclass(frozen=True)
class TierTables:
    """The tables of an input at every tier, by one range method, around ``shift`` [T,in] if there is one."""

    layer: LayerInput
    shift: Array | None
    tables: dict[int, ActivationTable]
    options: Options

    @classmethod
    def of(cls, layer: LayerInput, shift: Array | None, options: Options) -> TierTables:
        find = registry.get("range", options.range).function
        ranges, weight = layer.ranges, layer.weight
        if shift is None:
            return cls(layer, None, {bits: find(ranges, weight, bits) for bits in options.tiers}, options)
        return cls(layer, shift, {bits: centred(ranges, shift, weight, bits, find) for bits in options.tiers}, options)

    def bits(self) -> Array:
        """By the tier rule, [T]: the error is of the output and needs x as it is; thresholds are for what is rounded, x
        - shift.
        """
        ranges, options = self.layer.ranges, self.options
        seen = ranges if self.shift is None or options.rule == "error" else shifted(ranges, self.shift)
        rule = registry.get("tier", options.rule).function
        chosen: Array = rule(
            seen, self.layer.weight, self.tables, self.layer.costs, **options.tier_options(self.shift is not None)
        )
        return chosen

    def at(self, bits: Array) -> ActivationTable:
        """The table with these bits [T]."""
        return mixed(self.tables, bits)


@dataclass(frozen=True)
class DecidedInput:
    """An input that was decided on: its table, the facts, and the shift [T,in] that was offered to it, None but after a
    GELU.
    """

    layer: LayerInput
    shift: Array | None
    table: ActivationTable
    facts: dict[str, Any]


def decide_input(layer: LayerInput, shift: Array | None, options: Options) -> DecidedInput:
    """Bits, steps and shift of a layer's input. The shift is tried at the bits that the plain input gets; where it
    wins, the rule chooses again.

    Facts are means over timesteps: ``error``, weighed (``error_plain`` and ``error_shifted`` where a shift was tried),
    and for people ``relative_error`` of the output, not squared.
    """
    plain = TierTables.of(layer, None, options)
    table = plain.at(plain.bits())
    facts: dict[str, Any] = {"error": mean_error(layer, table), "shifted": False}
    if shift is not None:
        around = TierTables.of(layer, shift, options)
        facts |= {"error_plain": facts["error"], "error_shifted": mean_error(layer, around.at(table.bits))}
        if facts["error_shifted"] < facts["error_plain"]:
            table = around.at(around.bits())
            facts |= {"error": mean_error(layer, table), "shifted": True}
    facts |= {
        "relative_error": rms(relative_errors(layer.ranges, layer.weight, table)),
        "always_a8": bool((table.bits == max(TIERS)).all()),
        "mean_bits": float(table.bits.mean()),
    }
    return DecidedInput(layer, shift, table, facts)


def choose_table(seen: LayerInput, spec: ActivationSpec, after: After, rounded: Callable[[], Array]) -> ActivationTable:
    """The static table of a layer's input by its specification: the one place where a recipe's words become entries.

    Where bits or a shift have to be chosen, that is done for the exact weight, so that no choice hangs on how the
    weight happened to be rounded; where both are given, the range method spans the input for the rounded weight.

    Args:
        seen: The input as the specification looks at it, see ``LayerInput.of``, with the exact weight.
        spec: Static, not ``per_token``. With a ``budget`` it takes the fewest bits that stay within it, at most its
            own.
        after: The nonlinearities that wrote the input, by columns; see ``may_shift``.
        rounded: Gives the quantized weight [out,in] float32; asked only where it is needed.

    Returns:
        One entry for each noise level of ``seen``.
    """
    if spec.budget is None and not spec.shift:
        return registry.get("range", spec.range).function(seen.ranges, rounded(), spec.bits)
    if spec.budget is None:
        options = Options(range=spec.range, tiers=(spec.bits,))
    else:
        options = Options(budget=spec.budget, range=spec.range, tiers=tiers_of(spec))
    return decide_input(seen, centre_of(seen, spec, after), options).table


def errors_by_tier(seen: LayerInput, spec: ActivationSpec, after: After) -> Array:
    """The weighed error [tiers,T] of an input at each of its ``tiers_of``; where it may be shifted, with the better of
    the two at each tier.
    """
    options = Options(range=spec.range, tiers=tiers_of(spec))
    centre = centre_of(seen, spec, after)
    tables = [TierTables.of(seen, shift, options).tables for shift in ([None] if centre is None else [None, centre])]
    return np.array([min((seen.errors(table[bits]) for table in tables), key=np.mean) for bits in options.tiers])


def tiers_of(spec: ActivationSpec) -> tuple[int, ...]:
    """The bits that an input may have, ascending: never more than its specification says."""
    return tuple(bits for bits in TIERS if bits <= spec.bits)


def may_shift(after: str) -> bool:
    """Whether it can pay to shift what this nonlinearity wrote: of a GELU's output one side is short, and the codes for
    what would be on it are wasted.
    """
    return after == "gelu"


def shifts(after: After) -> list[slice]:
    """The columns of a layer's input that ``may_shift``."""
    return [slice(None) if columns is None else slice(*columns) for columns, name in after if may_shift(name)]


def centre_of(seen: LayerInput, spec: ActivationSpec, after: After) -> Array | None:
    """The shift [T,in] that a specification offers to an input: the middle of each channel, and 0 for columns that
    nothing skewed wrote; None where it offers none.
    """
    if not spec.shift or not (skewed := shifts(after)):
        return None
    middle = (seen.ranges.least + seen.ranges.most) / 2
    centre = np.zeros_like(middle)
    for columns in skewed:
        centre[:, columns] = middle[:, columns]
    return centre


def mean_error(layer: LayerInput, table: ActivationTable, rounded: Array | None = None) -> float:
    """The weighed error of a layer's output, averaged over timesteps, perhaps with a ``rounded`` weight [out,in]."""
    return float(np.mean(layer.errors(table, rounded)))
