"""Recipes by name: ``METHOD[+INGREDIENT...]-SPEC``, such as ``gptq-w4a8``, ``rtn-w3a16-g128`` or
``qronos+rotation+whitened16-w4a4``.

Every registered rounding method is a METHOD, with its steps searched, beside those in ``PRESETS``. Every registered
method of the ``NAMED`` kinds is an INGREDIENT, beside those in ``INGREDIENTS``; so what is registered can be named at
once. METHOD and INGREDIENTs make a template; SPEC, and the SPECs of overrides, fill its formats in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..errors import RecipeError
from ..grids.tables import BITS
from ..grids.weights import COARSE, WeightFormat
from ..methods import registry
from .ladder import stands_for
from .patterns import ROLE
from .presets import INGREDIENTS, PRESETS, RANK, USUAL, Template
from .recipe import REST, LayerSpec, Recipe, TwoSided
from .roles import CAREFUL, EMBEDDING

NAMED = ("transform", "branch", "range", "steps", "refine", "reconstruct")  # of two with one name the first is meant
_AVERAGE = re.compile(r"average([1-9]\d*)")  # with a batch size of its own
_SKETCH = re.compile(r"sketch([AB])(\d+)")  # a Hessian, and how much of a hundred its gradients weigh
_BITS, _FORM, _TABLE = r"(w[2-8])a(4|6|8|16)", r"(?:-tensor|-g\d+)?(?:-sym|-asym)?", "-static|-token"
_SPEC = re.compile(rf"{_BITS}({_FORM}(?:{COARSE})?)({_TABLE})?")
_FINE = re.compile(rf"(?<=[-=])({_BITS}{_FORM})(?={_TABLE}|,|$)")  # in a recipe's name, and without COARSE


def ingredients() -> list[str]:
    """What can stand after a ``+``: those with a name of their own, then the ``NAMED`` kinds as they are registered."""
    return list(dict.fromkeys([*INGREDIENTS, *(method.name for kind in NAMED for method in registry.members(kind))]))


def parse_template(text: str) -> Template:
    """``METHOD[+INGREDIENT...]``; raises RecipeError that lists what there is."""
    named, *added = text.split("+")
    rounding = [method.name for method in registry.members("round")]
    if named not in PRESETS and named not in rounding:
        raise RecipeError(f"unknown method {named!r}; known: {', '.join(sorted({*PRESETS, *rounding}))}")
    template = PRESETS[named] if named in PRESETS else USUAL.but(rounding=named)
    for ingredient in added:
        template = _with(template, ingredient)
    return template


def _with(template: Template, ingredient: str) -> Template:
    """A template with one more ingredient."""
    layer = template.layer
    branches = {branch.name for branch in registry.members("branch")}
    name, rank = ingredient.rstrip("0123456789"), ingredient[len(ingredient.rstrip("0123456789")) :]
    if ingredient in INGREDIENTS:
        if isinstance(template.probabilities, int) and "probabilities" in INGREDIENTS[ingredient]:
            raise RecipeError(
                f"{ingredient!r} comes after 'softmax{template.probabilities}'; a recipe has one width of probabilities"
            )
        return template.but(**INGREDIENTS[ingredient])
    if batch := _AVERAGE.fullmatch(ingredient):
        if layer.activation is not None and layer.activation.range == "average":
            raise RecipeError(f"{ingredient!r} comes after 'average'; a recipe has one range method")
        return _with(template, "average").but(range_batch=int(batch[1]))
    if limit := re.fullmatch(r"mixed(\d+(?:\.\d+)?)", ingredient):
        return template.but(mixed=True, bits_per_weight=float(limit[1]))
    if sketch := _SKETCH.fullmatch(ingredient):
        if not registry.get("round", layer.rounding).two_sided:
            raise RecipeError(
                f"{ingredient!r} is about two-sided rounding, and {layer.rounding} is none; round by kron"
            )
        return template.but(two_sided=TwoSided(sketch[1], int(sketch[2]) / 100))
    if name in branches and not rank.startswith("0"):
        if layer.branch is not None:
            raise RecipeError(f"{ingredient!r} comes after {layer.branch!r}; a recipe has one branch")
        return template.but(branch=name, rank=int(rank or RANK))
    kind = next((kind for kind in NAMED if any(found.name == ingredient for found in registry.members(kind))), None)
    if kind == "transform":
        if "rotation" in layer.transforms:
            raise RecipeError(
                f"{ingredient!r} comes after 'rotation', which must be the last: mixed channels have no scales"
            )
        return template.but(transforms=(*layer.transforms, ingredient))
    if kind == "range" and template.activation.range not in (USUAL.activation.range, ingredient):
        raise RecipeError(f"{ingredient!r} comes after {template.activation.range!r}; a recipe has one range method")
    if kind is not None:
        return template.but(**{kind: ingredient})
    raise RecipeError(
        f"unknown ingredient {ingredient!r}; known: {', '.join(sorted(ingredients()))}, a rank after"
        f" {sorted(branches)}, a batch size after 'average', and sketchA50 for a Hessian of two-sided rounding"
    )


def parse_spec(text: str, template: Template = USUAL) -> LayerSpec:
    """The layer of a template with the formats that a SPEC names: ``w4a8``, ``w4a16-g128``, ``w8a8-static`` …

    Raises RecipeError with the grammar.
    """
    match = _SPEC.fullmatch(text)
    if match is None:
        raise RecipeError(
            f"{text!r} is no specification; expected wBaB with weights of 2 to 8 bits and activations of {BITS}, "
            f"then optionally -g32/-g64/-g128/-tensor, -sym/-asym, {COARSE}, and -static or -token"
        )
    activation = None
    if match[2] != "16":
        static, token = match[4] == "-static", match[4] == "-token"
        activation = replace(template.activation, bits=int(match[2]), per_timestep=not static, per_token=token)
    return replace(template.layer, weight=WeightFormat.parse(match[1] + match[3]), activation=activation)


def parse_override(text: str, template: Template) -> tuple[str, LayerSpec | None]:
    """A rule ``PATTERN=SPEC``; SPEC is a recipe's name without its method, such as w8a16, or ``keep``. Raises
    RecipeError.
    """
    pattern, equals, spec = text.partition("=")
    if not equals or not pattern:
        raise RecipeError(f"override {text!r}: expected PATTERN=SPEC, such as '*.mlp.fc2=w8a16' or '@attention=keep'")
    return pattern, None if spec == "keep" else parse_spec(spec, template)


def parse_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by its name.

    Modulation, embedders and the output layer keep at least 8 bits and unquantized inputs: their error enters every
    block at every step. So do layers of other roles that their adapter calls careful.

    Args:
        name: ``METHOD[+INGREDIENT...]-SPEC``, such as "gptq-w4a8" or "qronos+rotation-w4a4-g64"; ``mlxquant methods``
            lists what there is. "fast", "good" and "best" stand for recipes, see ``ladder``; the result is named by the
            recipe.
        overrides: Rules ``PATTERN=SPEC`` that go before the recipe's own and keep its method, such as
            "*.mlp.fc2=w8a16" or "@attention=keep". A pattern is a glob over dotted paths, or a role.

    Returns:
        The recipe; its name has the overrides behind a comma.

    Raises:
        RecipeError: A name is unknown, the parts do not go together, or one of them would do nothing.

    Examples:
        >>> import mlxquant as mq
        >>> recipe = mq.parse_recipe("gptq+smoothquant-w4a8", ["@attention=keep"])
        >>> recipe.name
        'gptq+smoothquant-w4a8,@attention=keep'
    """
    name = stands_for(name)
    match = re.fullmatch(r"(.+?)-(w\d.*)", name)
    try:
        if match is None:
            raise RecipeError("expected METHOD[+INGREDIENT...]-SPEC, such as rtn-w4a8 or qronos+rotation-w4a4")
        template = parse_template(match[1])
        main = parse_spec(match[2], template)
    except RecipeError as error:
        raise RecipeError(f"unknown recipe {name!r}: {error}") from error
    rules: list[tuple[str, LayerSpec | None]] = [parse_override(text, template) for text in overrides]
    rules += [(ROLE + role, main.careful) for role in CAREFUL]
    if template.embeddings:
        rules.append((ROLE + EMBEDDING, main.of_weights))
    rules.append((REST, main))
    quantized = [spec for _, spec in rules if spec is not None]
    refuse_idle(name, match[1].split("+")[1:], template, inputs=any(spec.activation is not None for spec in quantized))
    own = None if main.activation is None else main.activation.bits
    probabilities = own if isinstance(template.probabilities, str) else template.probabilities
    return replace(template.recipe, name=",".join([name, *overrides]), rules=tuple(rules), probabilities=probabilities)


def with_bfloat16_scales(recipe: Recipe) -> Recipe:
    """A recipe whose every layer, whatever bits it gets, has scales that bfloat16 holds, chosen before codes are.

    A tool that runs bfloat16, such as mflux, then has the very scales of the calibration, and at full speed.

    Args:
        recipe: Any recipe.

    Returns:
        The same with ``-bf16`` in all formats, and, where it has a name that ``parse_recipe`` reads, in that.

    Examples:
        >>> from mlxquant.recipes.grammar import parse_recipe, with_bfloat16_scales
        >>> with_bfloat16_scales(parse_recipe("gptq-w4a16-g64", ["@attention=w8a8-token"])).name
        'gptq-w4a16-g64-bf16,@attention=w8a8-bf16-token'
    """
    rules = tuple((pattern, None if spec is None else spec.coarse) for pattern, spec in recipe.rules)
    return replace(recipe, name=_FINE.sub(rf"\1{COARSE}", recipe.name), rules=rules)


def refuse_idle(name: str, ingredients: Sequence[str], template: Template, inputs: bool) -> None:
    """Raise RecipeError on an ingredient that would do nothing: about ``inputs`` where none are quantized, or about no
    damping at all.
    """
    about_inputs = {"shift", "tiers", *(found.name for found in registry.members("range"))}
    idle = [added for added in ingredients if added in about_inputs or _AVERAGE.fullmatch(added)]
    if idle and not inputs:
        raise RecipeError(
            f"recipe {name}: {idle[0]!r} is about quantized inputs, and a16 has none; leave it out, or choose a8, a6"
            " or a4"
        )
    layer = template.layer
    if layer.held_out and not (layer.corrected or layer.branch or registry.get("round", layer.rounding).damped):
        raise RecipeError(
            f"recipe {name}: 'damped' chooses a damping, and {layer.rounding} has none; leave it out, or round by gptq"
        )
