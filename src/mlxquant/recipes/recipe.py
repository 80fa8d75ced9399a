"""Recipes: which format and which methods for which layer.

A recipe is an ordered list of rules; the first rule whose pattern names a layer decides. ``patterns`` has what a
pattern can be, ``grammar`` reads recipes by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from math import inf
from typing import Any, TypeVar

from ..errors import RecipeError
from ..grids.weights import WeightFormat
from ..methods import registry
from ..methods.inputs.tiers import TIERS
from ..methods.weights.adaround import Settings
from ..numerics.input_ranges import RANGE_BATCH
from .patterns import ROLE, is_open, named, unmatched
from .roles import EMBEDDING, ROLES, Role
from .tuning import Tuning

Part = TypeVar("Part")
SKETCHES = ("A", "B")  # of the factors of a Hessian, see ``curvature.factors``
REST = "*"  # as the last rule of a recipe: all that no other rule names


@dataclass(frozen=True)
class ActivationSpec:
    """How the input of a layer is quantized.

    Args:
        bits: 4, 6 or 8.
        range: The range method that chooses scales from what calibration saw.
        per_timestep: One entry a noise level; without, one for all.
        shift: Post-GELU inputs are shifted where that lowers the error.
        budget: Each layer takes at each noise level the fewest bits, at most ``bits``, whose error on calibration data
            stays within it: mean squared velocity error in a recipe with ``sensitivity``, and relative squared error of
            the layer's output in one without. None fixes the bits.
        per_token: Each token gets a scale of its own while the model runs, and nothing is calibrated.

    Raises:
        RecipeError: A value is out of range, or ``per_token`` meets what needs calibration.
    """

    bits: int = 8
    range: str = "extremes"
    per_timestep: bool = True
    shift: bool = False
    budget: float | None = None
    per_token: bool = False

    def __post_init__(self) -> None:
        if self.per_token and (self.range != "extremes" or self.budget is not None or self.shift):
            raise RecipeError(
                "activations with a scale a token have no range method, budget or shift; leave '-token' out, or those"
            )
        if self.bits not in TIERS:
            raise RecipeError(
                f"activation bits must be one of {TIERS}, found {self.bits}; leave the activation out for 16"
            )
        if self.budget is not None and not 0 < self.budget < inf:
            raise RecipeError(
                f"the error budget of activations must be a positive number, found {self.budget}; None fixes the bits"
            )


@dataclass(frozen=True)
class TwoSided:
    """The Hessian that a two-sided rounding has, see ``curvature.factors``.

    Args:
        sketch: By which its factors are made, "A" or "B"; "" for none, which is one-sided rounding.
        share: How much gradients weigh in the factor of inputs, from 0, which are the inputs' plain moments, to 1.
            Where errors are large, inputs without a gradient still matter.

    Raises:
        RecipeError: There is no such sketch, or the share is outside of [0,1].
    """

    sketch: str = "A"
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.sketch not in ("", *SKETCHES) or not 0 <= self.share <= 1:
            raise RecipeError(
                f"two-sided rounding has a sketch of {SKETCHES} and a share from 0 to 1, found {self.sketch!r} and"
                f" {self.share}"
            )

    def __str__(self) -> str:
        return f"sketch {self.sketch}, {self.share:g} of the gradients" if self.sketch else "one-sided"


@dataclass(frozen=True)
class LayerSpec:
    """What happens to a layer. Methods go by their names in the registry.

    Args:
        weight: The format of its weight.
        activation: How its input is quantized; None leaves it as it is.
        steps: The method that chooses the grid of the weight.
        rounding: The method that chooses the codes on it.
        corrected: Aim the rounding at weights that make up for the error of the layers before.
        reconstruct: The method that learns the codes of a stage together, starting from these.
        transforms: What is tried on the input first, in this order.
        branch: The method by which low-rank factors take from the weight what they can, before it is rounded.
        rank: Of the branch.
        held_out: Choose the damping of the rounding on tokens that it has not seen.
        refine: The method that improves steps and codes by turns, after the rounding.
        centred: Round for inputs less their mean, and let the layer's bias make up for the mean of the error; a layer
            without a bias is rounded as ever.
        two_sided: What a two-sided rounding goes by; None leaves the choice to ``sweep.two_sided``.

    Raises:
        RecipeError: ``corrected`` or ``refine`` meets a rounding that makes up for the layers before by itself.
    """

    weight: WeightFormat
    activation: ActivationSpec | None = None
    steps: str = "extremes"
    rounding: str = "rtn"
    corrected: bool = False
    reconstruct: str | None = None
    transforms: tuple[str, ...] = ()
    branch: str | None = None
    rank: int = 0
    held_out: bool = False
    refine: str | None = None
    centred: bool = False
    two_sided: TwoSided | None = None

    def __post_init__(self) -> None:
        if (self.corrected or self.refine) and registry.get("round", self.rounding).cross:
            wrong = "corrected" if self.corrected else self.refine
            raise RecipeError(
                f"{self.rounding} makes up for the layers before by itself; for {wrong!r} use gptq+corrected or"
                " descent+corrected"
            )

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> LayerSpec:
        """A layer of ``Recipe.to_dict``; an older version had one way to refine, and said whether."""
        activation, refine = saved.get("activation"), saved.get("refine")
        parts = {
            "weight": _read(WeightFormat, saved["weight"]),
            "activation": None if activation is None else _read(ActivationSpec, activation),
            "transforms": tuple(saved.get("transforms", ())),
            "refine": "refit" if refine is True else refine or None,
            "two_sided": None if saved.get("two_sided") is None else _read(TwoSided, saved["two_sided"]),
        }
        return _read(cls, {**saved, **parts})

    def to_dict(self) -> dict[str, Any]:
        """The layer as plain data; what is not two-sided says nothing of it."""
        found = {**asdict(self), "weight": self.weight.to_dict()}
        return found if self.two_sided is not None else {k: v for k, v in found.items() if k != "two_sided"}

    @property
    def coarse(self) -> LayerSpec:
        """With scales and biases of the weight that bfloat16 holds."""
        return replace(self, weight=self.weight.coarse)

    @property
    def plain(self) -> LayerSpec:
        """The same format by round-to-nearest: what every method has to beat."""
        return LayerSpec(self.weight, self.activation)

    @property
    def start(self) -> LayerSpec:
        """What a reconstruction starts from."""
        return replace(self, reconstruct=None)

    def without_branch(self) -> LayerSpec:
        """All in the integers."""
        return replace(self, branch=None, rank=0)

    def without_shift(self) -> LayerSpec:
        """The input's zero where it is."""
        return self if self.activation is None else replace(self, activation=replace(self.activation, shift=False))

    @property
    def careful(self) -> LayerSpec:
        """At least 8 bits and nothing that changes or quantizes the input: for layers whose error enters every block at
        every step.
        """
        weight = replace(self.weight, bits=max(8, self.weight.bits))
        return replace(self.start.without_branch(), weight=weight, activation=None, transforms=())

    @property
    def of_weights(self) -> LayerSpec:
        """The weight's part of it: for a table, whose rows are looked up as they are."""
        return replace(self, activation=None, transforms=())

    @property
    def open_ended(self) -> bool:
        """Whether it is still to be chosen by which Hessian it is rounded."""
        return registry.get("round", self.rounding).two_sided and self.two_sided is None

    @property
    def cross(self) -> bool:
        """Whether the rounding looks at the full-precision model's inputs, too."""
        return self.corrected or registry.get("round", self.rounding).cross


@dataclass(frozen=True)
class Recipe:
    """What happens to a model. ``parse_recipe`` makes one from a name, ``dataclasses.replace`` varies it.

    Args:
        name: By which it goes in reports and files.
        rules: Pattern and specification, in order: the first whose pattern names a layer decides, and None keeps the
            layer as it is.
        gate: Keep rounding to nearest for a stage where it wins.
        learning: How long and how hard to learn, for the layers that are reconstructed.
        sensitivity: Errors inside the model count as far as they change what it predicts; without, all channels and
            noise levels count the same.
        sequential: A block's layers are rounded one after the other, each on what the rounded ones before it write.
        rounds: Above 1, calibrate again on what the quantized model draws (TCAQ-DM's progressive alignment) and
            quantize again.
        probabilities: Bits of attention probabilities; None leaves those as they are.
        mixed: Layers get bits of their own within what the recipe's own formats take.
        bits_per_weight: Layers get bits of their own within this average over the quantized layers.
        bits_per_activation: The same for inputs.
        range_batch: Pictures, or windows of text, at one noise level whose smallest and largest values are one batch of
            the range method ``average``; see ``numerics.input_ranges``.
        tuning: Once all codes are chosen, tune scales, offsets, biases and input steps end to end; None leaves them.

    Raises:
        RecipeError: ``range_batch`` is less than 1.
    """

    name: str
    rules: tuple[tuple[str, LayerSpec | None], ...]
    gate: bool = True
    learning: Settings = field(default_factory=Settings)
    sensitivity: bool = False
    sequential: bool = False
    rounds: int = 1
    probabilities: int | None = None
    mixed: bool = False
    bits_per_weight: float | None = None
    bits_per_activation: float | None = None
    range_batch: int = RANGE_BATCH
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        if self.range_batch < 1:
            raise RecipeError(
                f"recipe {self.name}: a batch of averaged ranges has at least 1 sample, found {self.range_batch};"
                f" {RANGE_BATCH} is the default"
            )

    @property
    def averages(self) -> bool:
        """Whether any layer's range is averaged over batches."""
        specs = [spec for _, spec in self.rules if spec is not None]
        return any(spec.activation is not None and spec.activation.range == "average" for spec in specs)

    @property
    def allocates(self) -> bool:
        """Whether layers get bits of their own."""
        return self.mixed or self.bits_per_weight is not None or self.bits_per_activation is not None

    def plan(self, layers: Mapping[str, str]) -> dict[str, LayerSpec]:
        """What happens to each layer of a model; the first rule that names it decides.

        Where that is a last rule ``*``, layers of a ``careful`` role of the model's own get its ``careful`` form; of
        the usual ones a recipe says it rule by rule.

        Args:
            layers: The model's layers, path to role, as ``Adapter.roles`` has them. Embeddings are taken by rules
                that name their role, or one of them by its path, or nothing else: "*" stands for all but them.

        Returns:
            The layers that are quantized, by path, in the same order.

        Raises:
            RecipeError: When a pattern names no layer, or a role that the model does not have, or nothing is quantized.
        """
        if not layers:
            raise RecipeError(
                f"recipe {self.name}: the model has no layer in full precision that can be quantized; perhaps it is"
                " quantized already"
            )
        roles = {path: Role(role) for path, role in layers.items()}
        decided: dict[str, LayerSpec | None] = {}
        for index, (pattern, spec) in enumerate(self.rules, 1):
            rest = pattern == REST and index == len(self.rules)
            for path in self._named(pattern, spec, roles):
                role, own = roles[path], spec
                if spec is not None and role == EMBEDDING:
                    own = spec.of_weights
                elif spec is not None and rest and role.careful and role not in ROLES:
                    own = spec.careful
                decided.setdefault(path, own)
        plan = {path: spec for path in layers if (spec := decided.get(path)) is not None}
        if not plan:
            raise RecipeError(f"recipe {self.name} quantizes no layer of this model")
        return plan

    def _named(self, pattern: str, spec: LayerSpec | None, layers: Mapping[str, str]) -> list[str]:
        """The layers that a rule is about. An open pattern does not ask for tables of embeddings that it fits, unless
        it fits nothing else.
        """
        found = named(pattern, layers)
        if pattern.startswith(ROLE) and pattern.removeprefix(ROLE) not in (*ROLES, *layers.values()):
            known = ", ".join(dict.fromkeys(ROLE + role for role in layers.values()))
            raise RecipeError(f"recipe {self.name}: unknown role {pattern!r}; the model's roles are {known}")
        if not found and not pattern.startswith(ROLE):  # a model may well have no layer of one of the usual roles
            raise unmatched(f"recipe {self.name}:", pattern, list(layers))
        others = [path for path in found if layers[path] != EMBEDDING]
        return others if spec is not None and others and is_open(pattern) else found

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, as model.json keeps it; what is not tuned says nothing of it."""
        rules = tuple((pattern, None if spec is None else spec.to_dict()) for pattern, spec in self.rules)
        found = {**asdict(self), "rules": rules}
        return found if self.tuning is not None else {k: v for k, v in found.items() if k != "tuning"}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Recipe:
        """The recipe that ``to_dict`` was asked of. An older version knew fewer keys, which get their defaults, except
        that ``average`` was over single samples up to 0.2.0, guided and unguided ones apart: its ``range_batch`` is 1.

        Args:
            saved: What ``to_dict`` gave, before or after it was JSON.

        Raises:
            RecipeError: On keys that a newer version knows.
        """
        rules = tuple(
            (pattern, None if spec is None else LayerSpec.from_dict(spec)) for pattern, spec in saved["rules"]
        )
        learning = _read(Settings, saved.get("learning", {}))
        tuning = None if (own := saved.get("tuning")) is None else _read(Tuning, own)
        recipe = _read(cls, {**saved, "rules": rules, "learning": learning, "tuning": tuning})
        return replace(recipe, range_batch=1) if recipe.averages and "range_batch" not in saved else recipe


def _read(part: Callable[..., Part], saved: Mapping[str, Any]) -> Part:
    """A part of a recipe from its fields; raises RecipeError on fields that it does not have."""
    if unknown := saved.keys() - signature(part).parameters:
        raise RecipeError(
            f"a saved recipe sets {', '.join(sorted(unknown))}, which this version does not know; update mlxquant"
        )
    return part(**saved)
