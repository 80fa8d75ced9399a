"""Recipes by name: ``METHOD[+INGREDIENT...]-SPEC``, such as ``gptq-w4a8``, ``rtn-w3a16-g128`` or
``qronos+rotation+whitened16-w4a4``.

Every registered rounding method is a METHOD, with its steps searched, beside those in ``METHODS``. Every registered
method of the ``NAMED`` kinds is an INGREDIENT, beside those in ``INGREDIENTS``; so what is registered can be named at
once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import RecipeError
from ..grids.tables import BITS
from ..grids.weights import WeightFormat
from ..methods import registry
from ..methods.inputs.tiers import BUDGET
from .recipe import ActivationSpec, LayerSpec, Recipe

RANK = 32  # of a branch that names none, as in SVDQuant
LIKE_INPUTS = "like inputs"  # probabilities of as many bits as a recipe's inputs, exact where these are


@dataclass(frozen=True)
class Method:
    """What the name before a recipe's SPEC stands for: see ``LayerSpec``, ``ActivationSpec`` and ``Recipe``."""

    steps: str = "search"
    rounding: str = "gptq"
    reconstruct: str | None = None
    corrected: bool = False
    transforms: tuple[str, ...] = ()
    branch: str | None = None
    rank: int = 0
    held_out: bool = False
    refine: str | None = None
    range: str = "extremes"
    shift: bool = False
    budget: float | None = None
    sensitivity: bool = False
    sequential: bool = False
    rounds: int = 1
    probabilities: int | str | None = None
    mixed: bool = False
    bits_per_weight: float | None = None

    def layer(self, weight: WeightFormat, activation: ActivationSpec | None) -> LayerSpec:
        return LayerSpec(
            weight,
            activation,
            self.steps,
            self.rounding,
            self.corrected,
            self.reconstruct,
            self.transforms,
            self.branch,
            self.rank,
            self.held_out,
            self.refine,
        )


METHODS = {
    "rtn": Method("extremes", "rtn"),
    "gptq": Method(),
    "descent": Method(rounding="gptq-descent"),
    "qronos": Method(rounding="qronos", sequential=True),
    "gptaq": Method(rounding="gptaq", sequential=True),
    "smoothquant": Method("extremes", "rtn", transforms=("smoothquant",)),
    "quarot": Method(transforms=("rotation",)),
    "svdquant": Method(transforms=("smoothquant",), branch="svd", rank=RANK),
    "adaround": Method(rounding="rtn", reconstruct="adaround"),
    "tcaqdm": Method(
        rounding="rtn",
        reconstruct="adaround",
        transforms=("tcaq",),
        range="dynamic",
        rounds=2,
        probabilities=LIKE_INPUTS,
    ),
    "mixed": Method(mixed=True),
    "taqdit": Method(reconstruct="adaround", transforms=("smoothquant",), shift=True, budget=BUDGET, sensitivity=True),
}
INGREDIENTS: dict[str, dict[str, Any]] = {
    "shift": {"shift": True},
    "corrected": {"corrected": True, "sequential": True},  # its target is for the inputs that a layer will really get
    "sequential": {"sequential": True},
    "sensitivity": {"sensitivity": True},
    "damped": {"held_out": True},
    "learned": {"reconstruct": "adaround"},
    "unclipped": {"steps": "extremes"},
    "tiers": {"budget": BUDGET, "sensitivity": True},
    "progressive": {"rounds": 2},
    "mixed": {"mixed": True},
    **{f"softmax{bits}": {"probabilities": bits} for bits in BITS[:-1]},
}
NAMED = ("transform", "branch", "range", "steps", "refine", "reconstruct")  # of two with one name the first is meant
_SPEC = re.compile(r"(w[2-8])a(4|6|8|16)((?:-tensor|-g\d+)?(?:-sym|-asym)?)(-static|-token)?")


def ingredients() -> list[str]:
    """What can stand after a ``+``: those with a name of their own, then the ``NAMED`` kinds as they are registered."""
    return list(dict.fromkeys([*INGREDIENTS, *(method.name for kind in NAMED for method in registry.members(kind))]))


def parse_method(text: str) -> Method:
    """``METHOD[+INGREDIENT...]``; raises RecipeError that lists what there is."""
    named, *added = text.split("+")
    rounding = [method.name for method in registry.members("round")]
    if named not in METHODS and named not in rounding:
        raise RecipeError(f"unknown method {named!r}; known: {', '.join(sorted({*METHODS, *rounding}))}")
    method = METHODS.get(named, Method(rounding=named))
    for ingredient in added:
        method = _with(method, ingredient)
    return method


def _with(method: Method, ingredient: str) -> Method:
    """A method with one more ingredient."""
    branches = {branch.name for branch in registry.members("branch")}
    name, rank = ingredient.rstrip("0123456789"), ingredient[len(ingredient.rstrip("0123456789")) :]
    if ingredient in INGREDIENTS:
        if isinstance(method.probabilities, int) and "probabilities" in INGREDIENTS[ingredient]:
            raise RecipeError(
                f"{ingredient!r} comes after 'softmax{method.probabilities}'; a recipe has one width of probabilities"
            )
        return replace(method, **INGREDIENTS[ingredient])
    if limit := re.fullmatch(r"mixed(\d+(?:\.\d+)?)", ingredient):
        return replace(method, mixed=True, bits_per_weight=float(limit[1]))
    if name in branches and not rank.startswith("0"):
        if method.branch is not None:
            raise RecipeError(f"{ingredient!r} comes after {method.branch!r}; a recipe has one branch")
        return replace(method, branch=name, rank=int(rank or RANK))
    kind = next((kind for kind in NAMED if any(found.name == ingredient for found in registry.members(kind))), None)
    if kind == "transform":
        if "rotation" in method.transforms:
            raise RecipeError(
                f"{ingredient!r} comes after 'rotation', which must be the last: mixed channels have no scales"
            )
        return replace(method, transforms=(*method.transforms, ingredient))
    if kind == "range" and method.range not in (Method.range, ingredient):
        raise RecipeError(f"{ingredient!r} comes after {method.range!r}; a recipe has one range method")
    if kind is not None:
        fields: dict[str, Any] = {kind: ingredient}
        return replace(method, **fields)
    raise RecipeError(
        f"unknown ingredient {ingredient!r}; known: {', '.join(sorted(ingredients()))}, and a rank after"
        f" {sorted(branches)}"
    )


def parse_spec(text: str, method: Method) -> LayerSpec:
    """``w4a8``, ``w4a16-g128``, ``w8a8-static`` … by a method; raises RecipeError with the grammar."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise RecipeError(
            f"{text!r} is no specification; expected wBaB with weights of 2 to 8 bits and activations of {BITS}, "
            "then optionally -g32/-g64/-g128/-tensor, -sym/-asym, and -static or -token"
        )
    activation = None
    if match[2] != "16":
        static, token = match[4] == "-static", match[4] == "-token"
        activation = ActivationSpec(int(match[2]), method.range, not static, method.budget, method.shift, token)
    return method.layer(WeightFormat.parse(match[1] + match[3]), activation)


def parse_override(text: str, method: Method) -> tuple[str, LayerSpec | None]:
    """A rule ``PATTERN=SPEC``; SPEC is a preset's name without its method, such as w8a16, or ``keep``. Raises
    RecipeError.
    """
    pattern, equals, spec = text.partition("=")
    if not equals or not pattern:
        raise RecipeError(f"override {text!r}: expected PATTERN=SPEC, such as '*.mlp.fc2=w8a16' or '@attention=keep'")
    return pattern, None if spec == "keep" else parse_spec(spec, method)


def parse_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A preset by name behind the rules of ``overrides`` (see ``parse_override``), which keep its method.

    Modulation, embedders and the output layer keep at least 8 bits and unquantized inputs: their error enters every
    block at every step.
    """
    match = re.fullmatch(r"(.+?)-(w\d.*)", name)
    try:
        if match is None:
            raise RecipeError("expected METHOD[+INGREDIENT...]-SPEC, such as rtn-w4a8 or qronos+rotation-w4a4")
        method = parse_method(match[1])
        main = parse_spec(match[2], method)
    except RecipeError as error:
        raise RecipeError(f"unknown recipe {name!r}: {error}") from error
    rules: list[tuple[str, LayerSpec | None]] = [parse_override(text, method) for text in overrides]
    rules += [(role, main.careful) for role in ("@modulation", "@embedder", "@output")]
    rules.append(("*", main))
    quantized = [spec for _, spec in rules if spec is not None]
    refuse_idle(name, match[1].split("+")[1:], method, inputs=any(spec.activation is not None for spec in quantized))
    own = None if main.activation is None else main.activation.bits
    return Recipe(
        ",".join([name, *overrides]),
        tuple(rules),
        sensitivity=method.sensitivity,
        sequential=method.sequential,
        rounds=method.rounds,
        probabilities=own if isinstance(method.probabilities, str) else method.probabilities,
        mixed=method.mixed,
        bits_per_weight=method.bits_per_weight,
    )


def refuse_idle(name: str, ingredients: Sequence[str], method: Method, inputs: bool) -> None:
    """Raise RecipeError on an ingredient that would do nothing: about ``inputs`` where none are quantized, or about no
    damping at all.
    """
    about_inputs = {"shift", "tiers", *(found.name for found in registry.members("range"))}
    if not inputs and (idle := [ingredient for ingredient in ingredients if ingredient in about_inputs]):
        raise RecipeError(
            f"recipe {name}: {idle[0]!r} is about quantized inputs, and a16 has none; leave it out, or choose a8, a6"
            " or a4"
        )
    if method.held_out and not (method.corrected or method.branch or registry.get("round", method.rounding).damped):
        raise RecipeError(
            f"recipe {name}: 'damped' chooses a damping, and {method.rounding} has none; leave it out, or round by gptq"
        )
