"""One layer's weight by its specification: branch, steps, codes and dampings. What becomes of its input is
``inputs``'.

With a bias, only a part of a weight's error has to be rounded away. An error D = W − Q writes D x̄ on average, with x̄
the mean input, and that is added to the bias (bias correction, arXiv 1906.04721 section 4.2). What is left is
D (x − x̄), so a *centred* specification rounds for the covariance of the inputs in place of their second moments. That
matters where the mean is large: behind a SiLU most of the second moments is the mean's, and GPTQ spends the freedom of
a row on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import MlxQuantError
from ..grids.tables import ActivationTable
from ..grids.weights import Grid
from ..layers.kinds import known_kind
from ..layers.names import BIAS
from ..layers.packed import check_parts
from ..layers.product import QuantizedProduct
from ..methods import registry
from ..methods.weights.correction import corrected_target
from ..methods.weights.damping import CANDIDATES, TARGETS, ChosenDamping, choose_damping
from ..methods.weights.lowrank import refitted
from ..numerics.arrays import Array
from ..numerics.low_rank import LowRank
from ..numerics.moments import Moments
from ..numerics.part_moments import PartMoments
from ..numerics.transform import Transform
from ..recipes.recipe import LayerSpec


@dataclass(frozen=True)
class Dampings:
    """Chosen dampings of the corrected ``target``, of the ``rounding`` and of a ``branch``, None where it is the
    method's own.
    """

    target: float | None = None
    rounding: float | None = None
    branch: float | None = None

    @property
    def facts(self) -> dict[str, float]:
        named = {"target_damping": self.target, "damping": self.rounding, "branch_damping": self.branch}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Rounded:
    """A quantized layer beside its codes uint8 [rows,in], the weight [rows,in] that it stands for, that which its codes
    aimed at, its inputs' moments and, for each part of the weight, its dampings.

    The layer holds the codes as well, but packed: whoever compares them or learns from them takes them from here. The
    aim differs from the weight where it is corrected, or where a branch takes a part of it.
    """

    layer: QuantizedProduct
    codes: Array
    weight: Array
    target: Array
    moments: PartMoments
    dampings: tuple[Dampings, ...]

    def with_codes(self, codes: Array) -> Rounded:
        """The same layer with other codes uint8 [rows,in]."""
        return replace(self, layer=self.layer.with_codes(codes), codes=codes)

    @property
    def error(self) -> float:
        """Relative output error on the calibration inputs."""
        return self.moments.relative_error(self.weight, self.layer.effective())

    @property
    def facts(self) -> dict[str, Any]:
        """Dampings that were chosen, a list where the weight is of several parts, the parts that were rounded to
        nearest because no token reached them, and the share of a convolution's outputs whose patches count in the
        moments, where that are not all.
        """
        each = [part.facts for part in self.dampings]
        found: dict[str, Any] = each[0] if len(each) == 1 else {}
        if len(each) > 1:
            names = list(dict.fromkeys(name for part in each for name in part))
            found = {name: [part.get(name) for part in each] for name in names}
        missed, share = self.moments.without_data, self.moments.share
        found |= {"without_data": missed} if missed and len(each) > 1 else {}
        return found | ({"share_of_outputs": share} if share < 1 else {})


@dataclass(frozen=True)
class Preset:
    """What was decided about a layer's input elsewhere: its table, and by what its channels are divided ([in],
    online).
    """

    table: ActivationTable | None = None
    divisor: Array | None = None


@dataclass(frozen=True)
class _Part:
    """A part of a weight, rounded: what its codes aimed at, codes uint8 [rows,in] and their grid."""

    target: Array
    grid: Grid
    codes: Array
    branch: LowRank | None
    dampings: Dampings


def as_seen(moments: Moments) -> Moments:
    """What is rounded by: the moments of the inputs, as they were seen."""
    return moments


def quantize_layer(
    module: nn.Module,
    spec: LayerSpec,
    moments: PartMoments,
    path: str,
    transform: Transform,
    aim: Callable[[Moments], Moments] = as_seen,
) -> Rounded:
    """The weight of one layer by its specification, a part at a time; errors name the layer at ``path``.

    ``transform`` is what the layer does to its input while it runs, and ``moments`` are of inputs that went through it.
    A part that no token reached, beside others that were, is rounded to nearest. ``aim`` makes of a part's moments what
    its rounding goes by; errors are told by the moments themselves.
    """
    kind = known_kind(module)
    weight = transform.weight(np.array(kind.form.matrix_of(module).astype(mx.float32)).astype(np.float64))
    try:
        check_parts(spec.weight, len(moments.parts))
        bias, mean_inputs = BIAS in module and spec.centred, [part.mean for part in moments.parts]
        moments = moments.centred if bias else moments
        slices = zip(np.split(weight, len(moments.parts)), moments.parts, strict=True)
        alone = len(moments.parts) == 1
        parts = [_part(rows, spec, seen, aim) if alone or seen.count else _nearest(rows, spec) for rows, seen in slices]
    except MlxQuantError as error:
        raise type(error)(f"layer {path}: {error}") from error
    codes, target = (_stacked([getattr(part, name) for part in parts]) for name in ("codes", "target"))
    grid = Grid(spec.weight, *(_stacked([getattr(p.grid, name) for p in parts]) for name in ("scales", "biases")))
    divisor = None if transform.divisor is None else mx.array(transform.divisor, mx.float32)
    branch = _joined([part.branch for part in parts])
    layer = kind.form.of(module, codes, grid, divisor, transform.block, branch)
    if bias:
        _add_to_bias(layer, weight - layer.effective(), mean_inputs)
    dampings = tuple(part.dampings for part in parts)
    return Rounded(layer, np.ascontiguousarray(codes, np.uint8), weight, target, moments, dampings)


def _add_to_bias(layer: QuantizedProduct, missing: Array, means: Sequence[Array]) -> None:
    """Let a layer's bias write what is ``missing`` [rows,in] of its weight on the mean input [in] of each part."""
    slices = zip(np.split(missing, len(means)), means, strict=True)
    change = mx.array(np.concatenate([some @ mean for some, mean in slices]).astype(np.float32))
    bias = layer[BIAS]
    new = (bias.astype(mx.float32) + change.reshape(bias.shape)).astype(bias.dtype)
    layer.load_weights([(BIAS, new)], strict=False)


def _part(weight: Array, spec: LayerSpec, moments: Moments, aim: Callable[[Moments], Moments]) -> _Part:
    """One part of a weight [rows,in] by a specification."""
    dampings = _choose_dampings(weight, spec, moments)
    target, branch, grid, codes = _quantized(weight, spec, moments, dampings, aim)
    dampings = dampings if branch is None else replace(dampings, branch=branch.damping)
    return _Part(target, grid, codes, branch, dampings)


def _nearest(weight: Array, spec: LayerSpec) -> _Part:
    """A part rounded to nearest, without data, with an empty branch where the others have one."""
    grid = registry.get("steps", "extremes").function(weight, spec.weight)
    codes, branch = registry.get("round", "rtn").function(weight, grid), None
    if spec.branch is not None:
        rank = min(spec.rank, *weight.shape)
        branch = LowRank(np.zeros((len(weight), rank), np.float16), np.zeros((rank, weight.shape[1]), np.float16))
    return _Part(weight, grid, codes, branch, Dampings())


def _stacked(parts: Sequence[Array]) -> Array:
    """Arrays one below the other; the array itself where it is one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _joined(branches: Sequence[LowRank | None]) -> LowRank | None:
    """The branches of all parts in one, in float32 where one of them is."""
    found = [branch for branch in branches if branch is not None]
    if len(found) < 2:
        return found[0] if found else None
    dtype = np.result_type(*(branch.up.dtype for branch in found))
    up, down = (_stacked([getattr(branch, name) for branch in found]).astype(dtype) for name in ("up", "down"))
    return LowRank(up, down)


def _choose_dampings(weight: Array, spec: LayerSpec, moments: Moments) -> Dampings:
    """Where a specification wants it, by held-out tokens: first that of the corrected target, then, with it, that of
    the rounding.
    """
    chosen = Dampings()
    if spec.held_out and spec.corrected:
        chosen = Dampings(target=_damping(choose_damping(weight, corrected_target, moments, TARGETS)))
    if spec.held_out and registry.get("round", spec.rounding).damped:

        def quantize(rows: Array, seen: Moments, damping: float) -> Array:
            _, branch, grid, codes = _quantized(rows, spec, seen, replace(chosen, rounding=damping))
            return grid.dequantize(codes) if branch is None else grid.dequantize(codes) + branch.weight

        candidates = TARGETS if registry.get("round", spec.rounding).cross else CANDIDATES
        chosen = replace(chosen, rounding=_damping(choose_damping(weight, quantize, moments, candidates)))
    return chosen


def _damping(choice: ChosenDamping | None) -> float | None:
    return None if choice is None else choice.damping


def _quantized(
    weight: Array,
    spec: LayerSpec,
    moments: Moments,
    dampings: Dampings,
    aim: Callable[[Moments], Moments] = as_seen,
) -> tuple[Array, LowRank | None, Grid, Array]:
    """What the integers of a weight [rows,in] aim at, the branch beside them, their grid and their codes uint8
    [rows,in].
    """
    towards = {} if dampings.target is None else {"damping": dampings.target}
    target = corrected_target(weight, moments, **towards) if spec.corrected else weight
    options = {} if dampings.rounding is None else {"damping": dampings.rounding}
    goal = aim(moments)

    def rounded(values: Array, seen: Moments | None = goal) -> tuple[Grid, Array]:
        grid = registry.get("steps", spec.steps).function(values, spec.weight, seen)
        codes = registry.get("round", spec.rounding).function(values, grid, seen, **options)
        if spec.refine is None:
            return grid, codes
        refined: tuple[Grid, Array] = registry.get("refine", spec.refine).function(values, grid, codes, seen, **options)
        return refined

    def dequantized(values: Array, seen: Moments | None) -> Array:
        grid, codes = rounded(values, seen)
        return grid.dequantize(codes)

    if spec.branch is None:
        return target, None, *rounded(target)
    rank = min(spec.rank, *weight.shape)
    branch = registry.get("branch", spec.branch).function(target, moments, rank, dequantized)
    grid, codes = rounded(target - branch.weight)
    branch = refitted(branch, target, grid.dequantize(codes), moments)  # to what the rounding has left
    return target - branch.weight, branch, grid, codes
